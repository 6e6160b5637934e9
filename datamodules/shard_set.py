"""One of several sets of training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_lora.argument_types import check_types
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.errors import UserError
from lit_lora.redact import redact

MOST_REPEATS = 10_000
"""Most times that a pass shows a set."""


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
        share: Share of the set in the samples of each pass, above 0 and below 1, instead of ``repeats``. Beside sets without
            share that are shown N times in all, and shares that add up to S, the set is shown round(share N / (1 - S)) times in
            each pass. Defaults to null.

    Raises:
        UserError: If there are no shards, ``repeats`` is not above 0 and at most 10,000, or ``share`` is not between 0 and 1
            or is given beside ``repeats``.
    """

    shards: str | list[str]
    repeats: float = 1.0
    decoder: SampleDecoder | None = None
    prior: bool = False
    share: float | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not self.shards:
            raise UserError("a set of train_sets has no shards; name a folder of shards, or remove the set")
        if not 0 < self.repeats <= MOST_REPEATS:  # also refuses NaN
            raise UserError(
                f"repeats={self.repeats} of {self.name} must be above 0 and at most {MOST_REPEATS:,}; remove the set if it is "
                "not wanted"
            )
        if self.share is None:
            return
        if not 0 < self.share < 1:
            raise UserError(f"share={self.share} of {self.name} must be above 0 and below 1, as 0.3; or give repeats")
        if self.repeats != 1:
            raise UserError(f"{self.name} has repeats={self.repeats:g} and share={self.share:g}; give one of them")

    @property
    def specs(self) -> list[str]:
        """Names of the shards, as a list."""
        return [self.shards] if isinstance(self.shards, str) else list(self.shards)

    @property
    def name(self) -> str:
        """The first of the names of the shards, for messages."""
        return redact(self.specs[0])


def check_shares(sets: Sequence[ShardSet]) -> None:
    """Check that the shares of sets leave something for the others.

    Raises:
        UserError: If they add up to 1 or more, or no set is without share.
    """
    shares = [one.share for one in sets if one.share is not None]
    if shares and len(shares) == len(sets):
        raise UserError(
            f"all {len(sets)} sets of train_sets have a share, so that nothing tells the samples of a pass; remove the share of "
            "one set, which then takes the rest"
        )
    if sum(shares) >= 1:
        raise UserError(
            f"the shares of train_sets add up to {sum(shares):g}; they must leave some of 1 for the other sets"
        )
