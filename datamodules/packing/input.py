"""The interface of the kinds of input to packing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_lora.datamodules.packing.left_out import BadFile

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource

TAR_BLOCK = 512
"""Size of a tar block in bytes: a member has a header of one block and is padded to full blocks."""

_HINT_AFTER_S = 3.0


@dataclass(frozen=True, eq=False, kw_only=True)
class PackInput(ABC):
    """Samples to pack (N), in the order in which they are packed without shuffling.

    A new kind of input is a subclass in its own file, and an entry in ``find_input.INPUTS``.

    It keeps little data per sample, in columns, since there may be tens of millions of samples; their content is read when they
    are packed.

    Attributes:
        sizes: Size of each sample in a tar, in bytes, int64 (N,).
        fingerprint: A text that changes when the samples or their files change.
        bad: Files and samples that cannot be packed.
        skipped: Files that are left out and are not bad: unfinished shards, images that no table lists, other splits.
        notes: Remarks for the user.
        blocks: Number of each sample's block, ascending, int64 (N,): samples of a block are fast to read in order and slow to
            read at random. None if the order makes no difference.
    """

    extensions: ClassVar[tuple[str, ...]] = ()
    """Extensions, in lower case, of the files that :meth:`find` needs."""

    captions_are_beside: ClassVar[bool] = False
    """Whether the input is images with files of captions beside them."""

    sizes: NDArray[np.int64]
    fingerprint: str
    bad: tuple[BadFile, ...] = ()
    skipped: tuple[BadFile, ...] = ()
    notes: tuple[str, ...] = ()
    blocks: NDArray[np.int64] | None = field(default=None)

    @classmethod
    @abstractmethod
    def find(cls, source: PackSource) -> PackInput | None:
        """The samples of a folder or file; None if it is not this kind of input.

        Raises:
            UserError: If it is this kind of input but cannot be read or parsed.
        """

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def may_be_empty(self) -> bool:
        """Whether empty captions are meant, and no note is due about them. Defaults to False."""
        return False

    def read_files(self) -> Iterable[Path]:
        """Tables and shards that contain the samples. Defaults to none."""
        return ()

    def image_names(self) -> Iterable[str]:
        """Paths of the images that tables list, relative to the folder, bad ones included. Defaults to none."""
        return ()

    @property
    def packs_images_beside(self) -> bool:
        """Whether masks and sources beside images that tables list are packed with them. Defaults to False."""
        return False

    @abstractmethod
    def name(self, sample: int) -> str:
        """Name of a sample, for messages."""

    @abstractmethod
    def key(self, sample: int) -> str:
        """Key of a sample in its shard, unique and without dots."""

    @abstractmethod
    def members(self, sample: int) -> dict[str, bytes]:
        """Read the members of a sample, by extension.

        Raises:
            BadSampleError: If the members cannot be read.
        """

    @abstractmethod
    def select(self, samples: NDArray[np.int64]) -> PackInput:
        """Only the given samples, in this order, for a process that packs one shard."""


def show_planning(names: Iterable[str]) -> Iterable[str]:
    """Yield the names, with a progress bar if this takes more than a few seconds."""
    return tqdm(names, "planning", unit="sample", delay=_HINT_AFTER_S, leave=False, disable=None)


def packed_size(*sizes: int) -> int:
    """Size in a tar, in bytes, of members with these sizes."""
    return sum(TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK for size in sizes)
