"""Streaming of shards through webdataset's own pipeline."""
