"""The decoder that marks the class images of prior preservation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder

PRIOR = "prior"
"""Name of the entry of a batch that tells which samples are class images: a list of bool."""


@dataclass(frozen=True)
class MarkedDecoder(SampleDecoder):
    """Adds to each sample whether it is a class image.

    Args:
        decoder: Decoder of the samples.
        prior: Whether they are class images.
    """

    decoder: SampleDecoder
    prior: bool

    @property
    def required(self) -> dict[str, tuple[str, ...]]:
        return self.decoder.required

    @property
    def extensions(self) -> tuple[str, ...]:
        return self.decoder.extensions

    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        return self.decoder(members, slot, size, image_size) | {PRIOR: self.prior}

    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        return self.decoder.blank(size) | {PRIOR: self.prior}

    def batch_entries(self) -> dict[str, Any]:
        return self.decoder.batch_entries()
