"""The loader that follows a plan and keeps its position."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Protocol

from lit_lora.datamodules.batches.cursor import Cursor
from lit_lora.datamodules.batches.plan import Plan
from lit_lora.datamodules.batches.read_cursor import read_cursor, refuse_position
from lit_lora.datamodules.loading.bad_samples import BadSamples
from lit_lora.datamodules.loading.dataset import Batch, ShardDataset, SlotRequest
from lit_lora.datamodules.loading.device_copies import CopiedWork, DeviceCopies
from lit_lora.datamodules.loading.threads import LoaderThreads, SharedWork
from lit_lora.datamodules.loading.wordless import WordlessCaptions
from lit_lora.errors import UserError

LoaderState = dict[str, int | list[int]]


class ShardStage(Protocol):
    """Interface of :class:`~lit_lora.datamodules.staging.stager.Stager`, which copies shards before they are read."""

    def start(self, visit: int) -> None: ...

    def wait(self, visit: int) -> None: ...

    def passed(self, visit: int) -> None: ...

    def close(self) -> None: ...


class PlannedLoader:
    """One process's share of the planned batches, pass after pass.

    An iteration yields the remaining batches of the current pass; after it the next pass becomes the current one. ``len`` is
    the number of batches in the current pass. The state counts the batches that were yielded, so batches that threads have
    prefetched are not lost when a run is resumed. It is the same in all processes, and can be resumed with another number of
    processes and another global batch size.

    Attributes:
        copies: Copies of batches on a GPU, to which they are then moved ahead of time. Defaults to None: the batches are on the
            CPU.

    Args:
        dataset: Dataset of the samples.
        plan: Plan of the batches.
        rank: Number of this process. Defaults to 0.
        world_size: Number of processes, of which the global batch size is a multiple. Defaults to 1.
        num_workers: Threads that read and decode ahead. Defaults to 0, which reads each batch when it is requested.
        max_bad_samples: Maximum number of different bad samples in this process. Defaults to 0.
        identity: Numbers that identify the data; a state with other numbers is refused.
        stage: Stager that copies the shards of a visit to a local disk before they are read. Defaults to None: shards are
            read in place.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        plan: Plan,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_bad_samples: int = 0,
        identity: Mapping[str, int] | None = None,
        stage: ShardStage | None = None,
    ) -> None:
        self.plan = plan
        self.cursor = plan.start()
        self._dataset = dataset
        self._num_workers = num_workers
        self._identity = dict(identity or {})
        self._stage = stage
        self._staged = False
        self._share = _Share(plan, rank, world_size, within_visit=stage is not None)
        self._threads: LoaderThreads[list[SlotRequest], Batch] | None = None
        self.copies: DeviceCopies | None = None
        self.bad_samples = BadSamples(
            max_bad_samples, "bad samples", "trained with weight 0", "pack the shards again without them"
        )
        self.wordless = WordlessCaptions()

    def __len__(self) -> int:
        return self.cursor.pass_batches + self.plan.remaining(self.cursor)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the remaining batches of the current pass.

        Raises:
            UserError: If more than ``max_bad_samples`` samples are bad, or a shard cannot be staged.
        """
        pass_number = self.cursor.pass_number
        if self._stage is not None and not self._staged:
            self._stage.start(self.plan.visit(self.cursor))
            self._staged = True
        while self.cursor.pass_number == pass_number:
            if self._stage is not None:
                self._stage.wait(self.plan.visit(self.cursor))
            self._share.cursor = self.cursor
            self._share.ahead.clear()
            before = self.cursor
            for batch in self._fetch():
                self.bad_samples.count(batch.pop("bad"))
                self.wordless.count(batch)
                self._move(self._share.ahead.popleft())
                yield batch if self.copies is None else self.copies.finish(batch)
            # A decoder that raises StopIteration would end the batches early, and this loop would never end.
            assert self.cursor != before, "no batch was read; does the decoder raise StopIteration?"

    def state_dict(self) -> LoaderState:
        """The position, and numbers that identify plan and data, as integers and lists of integers."""
        cursor = self.cursor
        return {
            "pass": cursor.pass_number,
            "chunk_position": cursor.position,
            "repeat": cursor.repeat,
            "pass_batches": cursor.pass_batches,
            "visit_batches": cursor.visit_batches,
            "segments": [number for segment in cursor.segments for number in segment],
            **self._identities(),
        }

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue from a saved state.

        Raises:
            UserError: If the state belongs to other data or another plan, or is damaged.
        """
        if not isinstance(state, Mapping):
            refuse_position("it", repr(state)[:40], "a dict")
        remedies = {
            "seed": "restore seed",
            "chunks": "restore chunks.count or chunks.samples",
            "samples": "use the shards and val_samples of that run",
            "shards": "use the shards of that run in the same order",
            "keys": "the shards hold other samples now: use those of that run",
            "bucketing": "restore resolution and buckets",
            "repeats": "restore the repeats of train_sets",
            "pads": "restore chunks.leftovers",
        }
        for name, value in self._identities().items():
            found = state.get(name)
            if name == "keys" and found is None:
                continue  # older checkpoints lack it
            if type(found) is not int or found != value:
                raise UserError(
                    f"cannot resume within the data: the checkpoint has {name} {str(found)[:40]}, this run {value};"
                    f" {remedies[name]}, or load only the checkpoint's weights"
                )
        cursor = read_cursor(state, self.plan)
        self.close()
        self.cursor = self.plan.resume(cursor)

    def restart(self, state: LoaderState | None) -> None:
        """Continue from a saved state, or for None from the start.

        Raises:
            UserError: If the state belongs to other data or another plan.
        """
        if state is not None:
            self.load_state_dict(state)
            return
        self.close()
        self.cursor = self.plan.start()

    def close(self) -> None:
        """End the threads and the stage; the next iteration starts new ones."""
        if self._threads is not None:
            self._threads.close()
            self._threads = None
        self._stop_stage()

    def _identities(self) -> dict[str, int]:
        plan = self.plan
        own = {"seed": plan.seed, "chunks": plan.num_chunks, "samples": plan.num_samples}
        return own | self._identity | {"pads": int(plan.leftovers == "pad")}

    def _move(self, cursor: Cursor) -> None:
        before, now = self.plan.visit(self.cursor), self.plan.visit(cursor)
        self.cursor = cursor
        if self._stage is not None and now != before:
            # Batches come in order, so the chunks before this one are not read any more.
            self._stage.passed(now - 1)

    def _stop_stage(self) -> None:
        if self._stage is not None and self._staged:
            self._stage.close()
            self._staged = False

    def _fetch(self) -> Iterator[Batch]:
        if not self._num_workers:
            return map(self._load, self._share)
        if self._threads is None:
            self._threads = LoaderThreads(self._begin, self._num_workers)
        return self._threads.run(self._share)

    def _load(self, requests: list[SlotRequest]) -> Batch:
        batch = self._dataset.__getitems__(requests)
        return batch if self.copies is None else self.copies.begin(batch)

    def _begin(self, requests: list[SlotRequest]) -> SharedWork[Batch]:
        work = self._dataset.begin(requests)
        return work if self.copies is None else CopiedWork(work, self.copies)


class _Share:
    """One process's share of the global batches, from ``cursor`` to the end of the pass or, for staged shards, of the visit.

    Threads take batches ahead of time; ``ahead`` holds the position after each of them. They must not read staged shards beyond
    the current visit, since the stager frees space for later visits only when this one is over.
    """

    def __init__(self, plan: Plan, rank: int, world_size: int, within_visit: bool) -> None:
        self.cursor = plan.start()
        self.ahead: deque[Cursor] = deque()
        self._plan = plan
        self._within_visit = within_visit
        size = plan.global_batch_size // world_size
        self._places = slice(rank * size, (rank + 1) * size)

    def __iter__(self) -> Iterator[list[SlotRequest]]:
        visit = self._plan.visit(self.cursor)
        for batch, after in self._plan.walk(self.cursor):
            self.ahead.append(after)
            samples, weights, slots = (column[self._places].tolist() for column in batch[:3])
            rows = zip(samples, weights, slots, strict=True)
            yield [SlotRequest(sample, weight, slot, batch.size) for sample, weight, slot in rows]
            if self._within_visit and self._plan.visit(after) != visit:
                return
