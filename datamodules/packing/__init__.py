"""Images with captions from many kinds of input to shards."""
