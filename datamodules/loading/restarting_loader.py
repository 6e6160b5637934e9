"""The loader for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from lit_lora.datamodules.loading.dataset import Batch
from lit_lora.datamodules.loading.loader import PlannedLoader


class RestartingLoader(PlannedLoader):
    """Yields the first pass each time, from its start.

    So every evaluation sees the same samples in the same slots, also where the one before was cut short.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Yield the first pass.

        Raises:
            UserError: If more than ``max_bad_samples`` samples are bad.
        """
        start = self.plan.start()
        if self.plan.visit(self.cursor) != self.plan.visit(start):
            self.close()  # a stage does not go back
        self.cursor = start
        yield from super().__iter__()
