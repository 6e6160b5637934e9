"""The options of chunked training."""

from __future__ import annotations

from dataclasses import dataclass

from lit_lora.argument_types import check_types
from lit_lora.datamodules.batches.plan import MAX_PASSES, Leftovers
from lit_lora.datamodules.staging.staging import Staging
from lit_lora.errors import check_exclusive, check_most, check_whole

_MAX_STEPS = 1 << 31


@dataclass(frozen=True)
class Chunks:
    """Chunked training: training on one chunk of the shards after another.

    Each chunk is a random set of whole shards, the same in every epoch. An epoch visits each chunk once, in a new order;
    within a chunk all samples are shuffled.

    Args:
        count: Number of chunks. Defaults to 1, which shuffles all samples together.
        samples: Approximate number of samples in a chunk, instead of ``count``.
        passes: Passes over each chunk before moving on. Defaults to 1.
        steps: Number of batches from each chunk before moving on, instead of ``passes``.
        leftovers: Treatment of samples that do not fill a batch of their chunk and bucket: ``drop`` (default) drops them for
            the pass, ``pad`` fills the batch with samples of weight 0.
        staging: Options for copying the shards to a local disk, one chunk ahead of training. Required for shards that are not
            on a local disk. Defaults to null: shards are read in place.

    Raises:
        UserError: If a value is out of its bounds, or two options exclude each other.
    """

    count: int = 1
    samples: int | None = None
    passes: int = 1
    steps: int | None = None
    leftovers: Leftovers = "drop"
    staging: Staging | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_whole(1, **{"chunks.count": self.count, "chunks.samples": self.samples})
        check_whole(1, **{"chunks.passes": self.passes, "chunks.steps": self.steps})
        check_most(MAX_PASSES, **{"chunks.passes": self.passes})
        check_most(_MAX_STEPS, **{"chunks.steps": self.steps})
        check_exclusive(**{"chunks.count": self.count if self.count > 1 else None, "chunks.samples": self.samples})
        check_exclusive(**{"chunks.passes": self.passes if self.passes > 1 else None, "chunks.steps": self.steps})

    def number(self, num_samples: int) -> int:
        """The number of chunks for a data set of ``num_samples`` samples."""
        return self.count if self.samples is None else max(1, round(num_samples / self.samples))
