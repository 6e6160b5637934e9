"""Indexes of shards: where each member is, and how large each image is."""
