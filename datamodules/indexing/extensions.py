"""Extensions of the members that make a sample of images with captions."""

from __future__ import annotations

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of images; if a sample has several images, the first extension in this order is used."""

MASK_EXTENSION = "mask.png"
"""Extension of the mask that tells which part of an image is trained on."""

SOURCE_EXTENSIONS = ("source.jpg", "source.png", "source.webp")
"""Extensions of the image that an editing instruction starts from; the sample's image is what it leads to."""

CAPTION_EXTENSIONS = ("txt", "json", "cls")
"""Extensions of captions."""
