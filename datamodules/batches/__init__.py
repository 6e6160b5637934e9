"""Which samples make which batch: buckets, chunks and the plan of a pass."""
