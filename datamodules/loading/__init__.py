"""Batches on their way to the trainer: readers, threads, loaders, and how far they are."""
