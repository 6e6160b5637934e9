"""Reading of shards from remote storage and slow disks."""
