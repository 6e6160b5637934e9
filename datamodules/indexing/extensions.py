"""Extensions of the members that make a sample of images with captions."""

from __future__ import annotations

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of images; if a sample has several images, the first extension in this order is used."""

CAPTION_EXTENSIONS = ("txt", "json", "cls")
"""Extensions of captions."""
