"""Streaming of shards that webdataset reads sequentially."""
