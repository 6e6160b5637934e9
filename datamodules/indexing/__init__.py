"""What is known of shards without reading them again."""
