"""Shards wherever they lie."""
