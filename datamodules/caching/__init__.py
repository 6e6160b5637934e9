"""Caches: shards of latents and text embeddings instead of images and captions."""
