"""From a sample's bytes to its row in a batch: decode, frame, caption."""
