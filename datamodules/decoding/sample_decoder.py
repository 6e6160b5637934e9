"""The interface of a kind of samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self


class SampleDecoder(ABC):
    """Turns the members of a sample into its entries of a batch; a new kind of samples is one subclass.

    Give it to a datamodule as ``decoder``; nothing else has to know it. Shards index the members ``jpg``, ``jpeg``, ``png``,
    ``webp``, ``txt``, ``json``, ``cls``, ``safetensors``, ``npy``, ``npz`` and ``bin``.

    Loader threads call it concurrently, so it keeps no state between calls. Random choices should be a function of the seed
    and the slot (:func:`lit_lora.draws.seed_of`), so that a resumed run repeats them.
    """

    @property
    @abstractmethod
    def required(self) -> dict[str, tuple[str, ...]]:
        """What each sample must have: by name, the extensions of the members of which one is enough.

        It is checked for all samples before training starts.
        """

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of the members that are read; by default those of :attr:`required`."""
        return tuple(extension for extensions in self.required.values() for extension in extensions)

    @abstractmethod
    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        """Entries of one sample in a batch.

        In the batch, a tensor becomes a row of one tensor, so all samples of one ``size`` have the same shape; a tuple of
        integers becomes a row of one int64 tensor; a dict is put together entry by entry; anything else becomes an element
        of a list.

        Args:
            members: The sample's members by extension.
            slot: The number of this showing of the sample in the whole run.
            size: Planned height and width, in pixels.
            image_size: Width and height of the image according to the index, in pixels; (0, 0) without an image.

        Raises:
            BadSampleError: If a member is missing or cannot be used.
        """

    @abstractmethod
    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        """Entries for a batch in which no sample can be used, with the shapes that :meth:`__call__` gives.

        Args:
            size: Planned height and width, in pixels.
        """

    def batch_entries(self) -> dict[str, Any]:
        """Further entries of each batch as a whole; none by default."""
        return {}

    def with_seed(self, seed: int) -> Self:
        """A decoder that draws its random choices from the datamodule's seed; by default the decoder itself."""
        return self

    def for_evaluation(self) -> Self:
        """A decoder without random choices, for validation and testing; by default the decoder itself."""
        return self
