"""The interface of decoders for samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self


class SampleDecoder(ABC):
    """Converts the members of a sample to its entries in a batch; a new kind of sample needs one subclass.

    Pass an instance to a datamodule as ``decoder``. Indexes of shards contain the members ``jpg``, ``jpeg``, ``png``, ``webp``,
    ``txt``, ``json``, ``cls``, ``safetensors``, ``npy``, ``npz``, ``bin``, ``mask.png``, ``source.jpg``, ``source.png`` and
    ``source.webp``.

    Loader threads call the decoder concurrently, so it must not keep state between calls. Random choices should be a function of
    the seed and the slot (:func:`lit_lora.draws.seed_of`), so that a resumed run repeats them.
    """

    @property
    @abstractmethod
    def required(self) -> dict[str, tuple[str, ...]]:
        """Required members: for each kind of content, the extensions of which a sample must have at least one.

        This is checked for all samples before training starts.
        """

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of the members to read. Defaults to those of :attr:`required`."""
        return tuple(extension for extensions in self.required.values() for extension in extensions)

    @abstractmethod
    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        """The entries of one sample in a batch.

        In the batch, a tensor becomes a row of one tensor, so all samples of one ``size`` must have the same shape; a tuple of
        integers becomes a row of one int64 tensor; dicts are collated entry by entry; any other value becomes an element of a
        list.

        Args:
            members: The sample's members by extension.
            slot: Number of this occurrence of the sample in the whole run.
            size: Planned height and width, in pixels.
            image_size: Width and height of the image according to the index, in pixels; (0, 0) without an image.

        Raises:
            BadSampleError: If a member is missing or cannot be used.
        """

    @abstractmethod
    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        """Entries for a batch in which every sample is bad, with the shapes that :meth:`__call__` returns.

        Args:
            size: Planned height and width, in pixels.
        """

    def batch_entries(self) -> dict[str, Any]:
        """Additional entries of each batch as a whole. Defaults to none."""
        return {}

    def with_seed(self, seed: int) -> Self:
        """A decoder that makes its random choices with the datamodule's seed. Defaults to the decoder itself."""
        return self

    def for_evaluation(self) -> Self:
        """A decoder without random choices, for validation and testing. Defaults to the decoder itself."""
        return self
