"""Shards of latents and text embeddings in place of images."""
