"""Checks of shards for damage, and statistics of shards."""
