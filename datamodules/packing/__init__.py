"""Packing of images with captions from many kinds of input into shards."""
