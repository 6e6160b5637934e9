"""Reading and loading of batches: readers, threads, loaders and progress."""
