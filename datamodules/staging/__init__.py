"""Shards on local disk, a chunk ahead of training."""
