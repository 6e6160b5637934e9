"""Plans the memory of a run before it starts, by phase and kind, by simulating one step on tensors without contents."""
