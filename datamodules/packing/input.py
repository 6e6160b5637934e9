"""The interface of a kind of input to packing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource

TAR_BLOCK = 512
"""A member of a tar has a header of one block and is filled up to whole blocks."""

_HINT_AFTER_S = 3.0


@dataclass(frozen=True)
class BadFile:
    """A file or sample that is left out, and why."""

    file: str
    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class PackInput(ABC):
    """Samples to pack (N), in the order in which they are packed without shuffling.

    A new kind of input is a subclass in a file of its own, and its entry in ``find_input.INPUTS``.

    It holds little of each sample and all of it in columns, because there may be tens of millions; bytes are read when
    a sample is packed.

    Attributes:
        sizes: The bytes that each sample will take in a tar, int64 (N,).
        fingerprint: Changes when the samples or what they are read from change.
        bad: What cannot become a sample.
        incomplete: Shards that their maker has not finished.
        blocks: Samples with the same number are quick to read one after the other and slow to read at random, int64
            (N,) ascending; None where the order makes no difference.
    """

    extensions: ClassVar[tuple[str, ...]] = ()
    """Extensions of the files that :meth:`find` wants to know of, in lower case."""

    sizes: NDArray[np.int64]
    fingerprint: str
    bad: tuple[BadFile, ...] = ()
    incomplete: tuple[BadFile, ...] = ()
    blocks: NDArray[np.int64] | None = field(default=None)

    @classmethod
    @abstractmethod
    def find(cls, source: PackSource) -> PackInput | None:
        """The samples of a folder or file; None where it holds another kind of input.

        Raises:
            UserError: If it is of this kind and cannot be read or understood.
        """

    def __len__(self) -> int:
        return len(self.sizes)

    @abstractmethod
    def name(self, sample: int) -> str:
        """Name of a sample, for messages."""

    @abstractmethod
    def key(self, sample: int) -> str:
        """Key of a sample in the shard: unique and without dots."""

    @abstractmethod
    def members(self, sample: int) -> dict[str, bytes]:
        """The bytes of a sample's members by extension.

        Raises:
            BadSampleError: If the members cannot be read.
        """

    @abstractmethod
    def select(self, samples: NDArray[np.int64]) -> PackInput:
        """These samples alone, in this order, for a process that packs one shard."""


def show_planning(names: Iterable[str]) -> Iterable[str]:
    """The same names, with a progress bar if they take long."""
    return tqdm(names, "planning", unit="sample", delay=_HINT_AFTER_S, leave=False, disable=None)


def packed_size(*sizes: int) -> int:
    """The bytes that members of these sizes take in a tar."""
    return sum(TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK for size in sizes)
