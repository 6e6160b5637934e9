"""Loading of batches: readers, threads, loaders and progress."""
