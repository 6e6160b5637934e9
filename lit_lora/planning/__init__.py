"""What a run will take, known before it starts: memory by kind and phase, from a step on tensors without contents."""
