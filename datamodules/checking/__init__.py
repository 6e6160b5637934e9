"""Statistics of shards, and checks for damage."""
