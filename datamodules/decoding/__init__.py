"""Decoding of a sample's bytes to its entries in a batch: images, framing, captions, collation."""
