"""Count of the bad samples, with a limit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

from lit_lora.errors import UserError
from lit_lora.visible import visible


class BadSampleReport(NamedTuple):
    """A sample that could not be used, and the reason."""

    shard: str
    key: str
    reason: str


class BadSamples(dict[tuple[str, str], BadSampleReport]):
    """The different bad samples that this process has met, by shard and key.

    Args:
        limit: Maximum number of bad samples.
        what: Name of the bad samples in the error, in the plural.
        fate: What happens to a bad sample, for the warning: ``"skipped"``.
        remedy: What the user can do about them, for the error.
    """

    def __init__(self, limit: int, what: str, fate: str, remedy: str) -> None:
        super().__init__()
        self.limit = limit
        self._what = what
        self._fate = fate
        self._remedy = remedy

    def count(self, reports: Iterable[BadSampleReport]) -> None:
        """Count bad samples and warn of each new one.

        Raises:
            UserError: If their number exceeds the limit.
        """
        new = {(report.shard, report.key): report for report in reports if (report.shard, report.key) not in self}
        self.update(new)
        if len(self) > self.limit:
            raise UserError(
                f"{len(self)} {self._what}, more than max_bad_samples={self.limit}; {self._remedy} or raise"
                f" max_bad_samples:{list_reports(self.values())}"
            )
        for report in new.values():
            warnings.warn(
                f"bad sample {visible(report.key)} in {visible(report.shard)}, {self._fate}: {visible(report.reason)}"
                f" ({len(self)} of at most {self.limit})",
                stacklevel=3,
            )


def list_reports(reports: Iterable[BadSampleReport]) -> str:
    """The first ten reports, one per line."""
    return "".join(
        f"\n  {visible(report.key)} in {visible(report.shard)}: {visible(report.reason)}"
        for report in list(reports)[:10]
    )
