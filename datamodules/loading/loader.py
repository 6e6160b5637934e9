"""The loader that follows a plan and remembers where it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from lit_lora.datamodules.batches.cursor import Cursor, Segment
from lit_lora.datamodules.batches.plan import Plan
from lit_lora.datamodules.loading.bad_samples import BadSamples
from lit_lora.datamodules.loading.dataset import Batch, ShardDataset, SlotRequest
from lit_lora.datamodules.loading.threads import LoaderThreads
from lit_lora.errors import UserError

LoaderState = dict[str, int | list[int]]


class ShardStage(Protocol):
    """Copies shards to a local disk before they are read; see :class:`~lit_lora.datamodules.staging.stager.Stager`."""

    def start(self, visit: int) -> None: ...

    def wait(self, visit: int) -> None: ...

    def passed(self, visit: int) -> None: ...

    def close(self) -> None: ...


class PlannedLoader:
    """One process's share of the planned batches, pass after pass.

    An iteration yields the batches of the current pass that are still to come; then the next pass is the current one.
    ``len`` is the number of batches in the current pass. The state counts the batches that were handed out, so what
    threads have prefetched is not lost when a run is resumed, and it is the same in all processes: it may be resumed
    with another number of them, and with another global batch size.

    Args:
        dataset: Reads the samples.
        plan: Says which sample goes where.
        rank: Number of this process, by default 0.
        world_size: Number of processes, by default 1; the global batch is a multiple of it.
        num_workers: Threads that read and decode ahead; 0 (default) reads when a batch is asked for.
        max_bad_samples: Maximum number of different bad samples in this process, by default 0.
        identity: Numbers that identify the data; a state with other numbers is refused.
        stage: Copies the shards of a visit to a local disk before they are read; None (default) if that is not needed.
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
        self.bad_samples = BadSamples(
            max_bad_samples, "bad samples", "trained with weight 0", "pack the shards again without them"
        )

    def __len__(self) -> int:
        return self.cursor.pass_batches + self.plan.remaining(self.cursor)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current pass.

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
            for batch in self._fetch():
                self.bad_samples.count(batch.pop("bad"))
                self._move(self._share.ahead.popleft())
                yield batch

    def state_dict(self) -> LoaderState:
        """The place of the loader, and numbers that identify plan and data: integers and lists of integers."""
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
        """Go to the place of a saved state.

        Raises:
            UserError: If the state belongs to other data or another plan.
        """
        remedies = {
            "seed": "set the seed back",
            "chunks": "set chunks.count or chunks.samples back",
            "samples": "use the shards of that run",
            "shards": "use the shards of that run in the same order",
            "bucketing": "set resolution and buckets back",
            "pads": "set chunks.leftovers back",
        }
        for name, value in self._identities().items():
            if state.get(name) != value:
                raise UserError(
                    f"cannot resume within the data: the checkpoint has {name} {state.get(name)}, this run {value};"
                    f" {remedies[name]}, or load the checkpoint's weights alone"
                )
        numbers: Any = state
        pairs = zip(numbers["segments"][::2], numbers["segments"][1::2], strict=True)
        self.close()
        self.cursor = self.plan.resume(
            Cursor(
                numbers["pass"],
                numbers["chunk_position"],
                numbers["repeat"],
                numbers["pass_batches"],
                numbers["visit_batches"],
                tuple(Segment(*pair) for pair in pairs),
            )
        )

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
            # Batches come in order, so nobody reads the chunks before this one any more.
            self._stage.passed(now - 1)

    def _stop_stage(self) -> None:
        if self._stage is not None and self._staged:
            self._stage.close()
            self._staged = False

    def _fetch(self) -> Iterator[Batch]:
        if not self._num_workers:
            return map(self._dataset.__getitems__, self._share)
        if self._threads is None:
            self._threads = LoaderThreads(self._dataset.__getitems__, self._num_workers)
        return self._threads.run(self._share)


class _Share:
    """One process's share of the global batches, from ``cursor`` to the end of the pass, or of the visit.

    Threads take batches ahead of time; ``ahead`` has the place after each of them. Over shards that are staged they
    must not ask beyond the visit: the stage makes room for the one after the next when this one is over.
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
