"""Assignment of samples to batches: buckets, chunks and the plan of a pass."""
