"""Plans the memory of a run before it starts, by phase and kind, from one step on tensors without contents."""
