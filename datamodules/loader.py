"""The loader that follows a plan and remembers where it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lit_lora.datamodules.dataset import BadSampleReport, Batch, ShardDataset, SlotRequest
from lit_lora.datamodules.plan import Plan
from lit_lora.errors import UserError


class PlannedLoader:
    """One process's share of the planned batches, pass after pass.

    An iteration yields the batches of the current pass that are still to come; then the next pass is the current one.
    ``len`` is the number of batches in a whole pass. The state counts the batches that were handed out, so what
    workers have prefetched is not lost when a run is resumed, and it is the same in all processes: it may be resumed
    with another number of them, as long as the global batch stays as large.

    Args:
        dataset: Reads the samples.
        plan: Says which sample goes where.
        rank: The number of this process.
        world_size: The number of processes; the global batch is a multiple of it.
        num_workers: Worker processes that read and decode; 0 does it in this one.
        max_bad_samples: So many different samples may be bad before this process gives up.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        plan: Plan,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_bad_samples: int = 0,
    ) -> None:
        self.plan = plan
        self.max_bad_samples = max_bad_samples
        self.pass_number = 0
        self.batch_number = 0
        self._dataset = dataset
        self._num_workers = num_workers
        self._share = _Share(plan, rank, world_size)
        self._workers: DataLoader[Batch] | None = None
        self._iterator: Any = None  # by this name Lightning looks for worker processes when it ends
        self._bad: dict[tuple[str, str], BadSampleReport] = {}

    def __len__(self) -> int:
        return self.plan.batches_per_pass

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current pass.

        Raises:
            UserError: More than ``max_bad_samples`` samples are bad.
        """
        self._share.start = (self.pass_number, self.batch_number)
        for batch in self._fetch():
            self._count_bad(batch.pop("bad"))
            self._step()
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the loader is, and what that refers to."""
        return {
            "pass": self.pass_number,
            "batch": self.batch_number,
            "seed": self.plan.seed,
            "global_batch_size": self.plan.global_batch_size,
            "num_samples": self.plan.num_samples,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the place of a saved state.

        Raises:
            UserError: The state belongs to another plan.
        """
        remedies = {
            "seed": "set the seed back",
            "global_batch_size": "choose batch_size times the number of processes to match",
            "num_samples": "use the shards of that run",
        }
        own = self.state_dict()
        for name, remedy in remedies.items():
            if state.get(name) != own[name]:
                raise UserError(
                    f"cannot resume within the data: the checkpoint has {name} {state.get(name)}, this run {own[name]};"
                    f" {remedy}, or load the checkpoint's weights alone"
                )
        self.pass_number, self.batch_number = state["pass"], state["batch"]

    def close(self) -> None:
        """End the worker processes; the next iteration starts new ones.

        Left to the garbage collector, they may take seconds to end.
        """
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            self._iterator._shutdown_workers()
        self._iterator = None

    def _step(self) -> None:
        self.batch_number += 1
        if self.batch_number == len(self):
            self.pass_number, self.batch_number = self.pass_number + 1, 0

    def _fetch(self) -> Iterator[Batch]:
        if self._workers is None or self._iterator is None:
            self._workers = DataLoader(
                self._dataset,
                batch_sampler=self._share,
                num_workers=self._num_workers,
                collate_fn=_identity,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=self._num_workers > 0,
                # Otherwise each pass would draw from the global generator, and a resumed run draw something else.
                generator=torch.Generator(),
            )
        self._iterator = iter(self._workers)
        iterator: Iterator[Batch] = self._iterator
        return iterator

    def _count_bad(self, reports: list[BadSampleReport]) -> None:
        new = {(r.shard, r.key): r for r in reports if (r.shard, r.key) not in self._bad}
        self._bad.update(new)
        if len(self._bad) > self.max_bad_samples:
            shown = "".join(f"\n  {r.key} in {r.shard}: {r.reason}" for r in list(self._bad.values())[:10])
            raise UserError(
                f"{len(self._bad)} bad samples, more than max_bad_samples={self.max_bad_samples};"
                f" pack the shards again without them or raise max_bad_samples:{shown}"
            )
        for report in new.values():
            warnings.warn(
                f"bad sample {report.key} in {report.shard}, trained with weight 0: {report.reason}"
                f" ({len(self._bad)} of at most {self.max_bad_samples})",
                stacklevel=3,
            )


class _Share(Sampler[list[SlotRequest]]):
    """One process's part of the global batches, from ``start`` (pass, batch) to the end of that pass."""

    def __init__(self, plan: Plan, rank: int, world_size: int) -> None:
        self.start = (0, 0)
        self._plan = plan
        size = plan.global_batch_size // world_size
        self._places = slice(rank * size, (rank + 1) * size)

    def __iter__(self) -> Iterator[list[SlotRequest]]:
        pass_number, first = self.start
        for batch_number in range(first, self._plan.batches_per_pass):
            columns = self._plan.batch(pass_number, batch_number)
            yield [SlotRequest(*row) for row in zip(*(c[self._places].tolist() for c in columns), strict=True)]


def _identity(batch: Any) -> Any:
    return batch
