"""The loader for evaluation and overfitting, which restarts at each iteration."""

from __future__ import annotations

from collections.abc import Iterator

from lit_lora.datamodules.loading.dataset import Batch
from lit_lora.datamodules.loading.loader import PlannedLoader


class RestartingLoader(PlannedLoader):
    """A loader that yields the first pass from its start at each iteration.

    Every evaluation sees the same samples in the same slots, even if the previous one was interrupted.
    """

    goes_on = False
    """Whether the next iteration goes on at the loader's position, in an epoch that a resumed run goes on with."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the first pass, or the rest of it.

        Raises:
            UserError: If more than ``max_bad_samples`` samples are bad.
        """
        goes_on, self.goes_on = self.goes_on, False
        start = self.cursor if goes_on else self.plan.start()
        if self.plan.visit(self.cursor) != self.plan.visit(start):
            self.close()  # a stager cannot return to an earlier visit
        self.cursor = start
        yield from super().__iter__()
