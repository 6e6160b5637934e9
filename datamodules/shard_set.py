"""One of several sets of training data."""

from __future__ import annotations

from dataclasses import dataclass

from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.errors import UserError
from lit_lora.redact import redact

_MOST_REPEATS = 10_000


@dataclass(frozen=True)
class ShardSet:
    """A set of shards with its own number of repeats, captions and crops.

    Args:
        shards: Shards of the set, named as in ``train_shards``.
        repeats: Number of times that each pass shows the samples. Defaults to 1. A set of n samples with 2.5 repeats is shown
            round(2.5 n) times in each pass: each sample twice, and another half of them once more from pass to pass.
        decoder: Conversion of the set's samples to their entries in a batch. Defaults to null: the datamodule's ``decoder``.
        prior: Whether the set holds class images, for the objective's ``prior``. Defaults to false. None of them are held out
            for validation.

    Raises:
        UserError: If there are no shards, or ``repeats`` is not above 0 and at most 10,000.
    """

    shards: str | list[str]
    repeats: float = 1.0
    decoder: SampleDecoder | None = None
    prior: bool = False

    def __post_init__(self) -> None:
        if not self.shards:
            raise UserError("a set of train_sets has no shards; name a folder of shards, or remove the set")
        if not 0 < self.repeats <= _MOST_REPEATS:  # also refuses NaN
            raise UserError(
                f"repeats={self.repeats} of {self.name} must be above 0 and at most {_MOST_REPEATS:,}; remove the set if it is "
                "not wanted"
            )

    @property
    def specs(self) -> list[str]:
        """Names of the shards, as a list."""
        return [self.shards] if isinstance(self.shards, str) else list(self.shards)

    @property
    def name(self) -> str:
        """The first of the names of the shards, for messages."""
        return redact(self.specs[0])
