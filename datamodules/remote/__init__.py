"""Reading of shards from remote and slow storage."""
