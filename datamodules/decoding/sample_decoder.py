"""From the members of a sample to what a batch holds of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class SampleDecoder(ABC):
    """Makes the entries of a batch; a new kind of sample is a subclass."""

    @property
    @abstractmethod
    def required(self) -> dict[str, tuple[str, ...]]:
        """What each sample must have: by name, members of which one is enough."""

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that are read."""
        return tuple(extension for extensions in self.required.values() for extension in extensions)

    @abstractmethod
    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        """The entries of one sample in a batch.

        Args:
            members: Its members by extension.
            slot: The number of this showing of the sample.
            size: Height and width that are wanted, in pixels.
            image_size: Width and height of the image according to the index.

        Raises:
            BadSampleError: A member is missing or cannot be used.
        """

    @abstractmethod
    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        """Entries for a batch in which no sample can be used."""

    def batch_entries(self) -> dict[str, Any]:
        """What each batch holds besides."""
        return {}
