"""Shards through webdataset's own pipeline."""
