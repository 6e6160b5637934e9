"""Samples of shards, read and decoded a batch at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lit_lora.datamodules.decode import BadSampleError, check_pixels, decode_json, decode_rgb, decode_text
from lit_lora.datamodules.framing import FramedImage, Framing
from lit_lora.datamodules.scan import EXTENSIONS, IMAGE_EXTENSIONS
from lit_lora.datamodules.table import SampleTable
from lit_lora.errors import UserError

Batch = dict[str, Any]


class SlotRequest(NamedTuple):
    """One place of a batch: the sample that goes there, its weight, and the number of the place in the whole run."""

    sample: int
    weight: float
    slot: int


class BadSampleReport(NamedTuple):
    """A sample that could not be used."""

    shard: str
    key: str
    reason: str


class _Sample(NamedTuple):
    key: str
    caption: str
    image: FramedImage


class ShardDataset(Dataset[Batch]):
    """Random access to samples of shards.

    Args:
        table: The samples of all shards.
        samples: Those that belong to this data set, numbers in ``table``, int64 (N,).
        framing: How images become squares.
        caption_extensions: Where the caption is; of several, the first that a sample has.
        caption_key: The key of the caption in ``.json`` members.

    Raises:
        UserError: Samples lack an image or a caption.
    """

    def __init__(
        self,
        table: SampleTable,
        samples: NDArray[np.int64],
        framing: Framing,
        caption_extensions: Sequence[str] = ("txt", "json"),
        caption_key: str = "caption",
    ) -> None:
        self.table = table
        self.samples = samples
        self.framing = framing
        self.caption_key = caption_key
        self._image = self._find("image", IMAGE_EXTENSIONS)
        self._caption = self._find("caption", caption_extensions)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, requests: Sequence[SlotRequest]) -> Batch:
        """One batch of B places.

        A bad sample does not change the shapes: another sample of the batch stands in for it with weight 0, and it is
        reported under ``"bad"``, because an exception would reach the main process without its type.

        Returns:
            ``pixel_values`` uint8 (B, 3, R, R), ``caption`` list[str], ``original_size`` int64 (B, 2) height and width,
            ``crop_top_left`` int64 (B, 2), ``weight`` float32 (B,), ``slot`` list[int], ``key`` list[str], ``bad``
            list[BadSampleReport].
        """
        loaded: list[_Sample | None] = []
        bad: list[BadSampleReport] = []
        for request in requests:
            number = int(self.samples[request.sample])
            try:
                loaded.append(self._load(number, request.slot))
            except BadSampleError as error:
                loaded.append(None)
                bad.append(BadSampleReport(str(self.table.path(number)), self.table.key(number), str(error)))
        stand_in = next((sample for sample in loaded if sample is not None), self._blank())
        samples = [sample or stand_in for sample in loaded]
        weights = [request.weight if sample else 0.0 for request, sample in zip(requests, loaded, strict=True)]
        return {
            "pixel_values": torch.stack([sample.image.pixels for sample in samples]),
            "caption": [sample.caption for sample in samples],
            "original_size": torch.tensor([sample.image.original_size for sample in samples]),
            "crop_top_left": torch.tensor([sample.image.crop_top_left for sample in samples]),
            "weight": torch.tensor(weights),
            "slot": [request.slot for request in requests],
            "key": [sample.key for sample in samples],
            "bad": bad,
        }

    def _find(self, what: str, extensions: Sequence[str]) -> NDArray[np.int64]:
        members = self.table.find_members(extensions)
        lacking = self.samples[members[self.samples] < 0]
        if len(lacking):
            shard = self.table.shard[lacking[0]]
            here = lacking[self.table.shard[lacking] == shard]
            keys = ", ".join(self.table.key(number) for number in here[:3])
            wanted = " or ".join(f".{extension}" for extension in extensions)
            raise UserError(
                f"{len(lacking)} of {len(self.samples)} samples have no {what} ({wanted}); in"
                f" {self.table.paths[shard]} {len(here)} of {(self.table.shard[self.samples] == shard).sum()},"
                f" first {keys}; add what is missing or leave these samples out"
            )
        return members

    def _load(self, number: int, slot: int) -> _Sample:
        check_pixels(int(self.table.width[number]), int(self.table.height[number]))
        image, caption = self._read(number)
        if EXTENSIONS[self.table.member_extension[self._caption[number]]] == "txt":
            text = decode_text(caption)
        else:
            text = decode_json(caption, self.caption_key)
        return _Sample(self.table.key(number), text, self.framing(decode_rgb(image), slot))

    def _read(self, number: int) -> tuple[bytes, bytes]:
        """The bytes of the image and of the caption.

        The shard is opened anew each time: that takes microseconds, and leaves nothing open in forked workers.
        """
        try:
            descriptor = os.open(self.table.path(number), os.O_RDONLY)
            try:
                return self._pread(descriptor, self._image[number]), self._pread(descriptor, self._caption[number])
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BadSampleError(f"cannot read the shard ({error.strerror})") from error

    def _pread(self, descriptor: int, member: np.int64) -> bytes:
        size = int(self.table.member_size[member])
        data = os.pread(descriptor, size, int(self.table.member_offset[member]))
        if len(data) < size:
            raise BadSampleError("the shard is shorter than when it was indexed")
        return data

    def _blank(self) -> _Sample:
        side = self.framing.resolution
        return _Sample("", "", FramedImage(torch.zeros(3, side, side, dtype=torch.uint8), (side, side), (0, 0)))
