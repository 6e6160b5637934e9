"""The training side of staging: starts the staging process and waits for its shards."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.remote.transfer import redact
from lit_lora.datamodules.staging.config import StagerConfig
from lit_lora.datamodules.staging.files import (
    is_alive,
    job_path,
    local_name,
    passed_path,
    read_job,
    slot_path,
    write_text,
)
from lit_lora.datamodules.staging.plan import StagingPlan
from lit_lora.errors import UserError
from lit_lora.files import writable_folder

_LOG = logging.getLogger("lit_lora")
_POLL_S = 0.05
_ATTACH_S = 120.0
_CLOSE_S = 10.0
_FIRST_LOG_S = 10.0
_LOG_EVERY_S = 30.0
_ENDED = (
    "the process that stages shards has ended; if there is no error of its own above, it was killed, perhaps for lack"
    " of memory; start again"
)


@dataclass(frozen=True)
class StagedShard:
    """A shard to copy.

    Attributes:
        location: Its path or URL.
        size: Its bytes, from the index.
    """

    location: str
    size: int


def check_budget(chunk_bytes: Sequence[int], budget: int) -> None:
    """Check that any two chunks fit into the budget together.

    Args:
        chunk_bytes: Bytes of the shards of each chunk.
        budget: The most bytes that may be kept.

    Raises:
        UserError: If they do not fit.
    """
    needed = sum(sorted(chunk_bytes)[-2:])
    if needed > budget:
        number = "the only chunk has" if len(chunk_bytes) == 1 else f"the two largest of {len(chunk_bytes)} chunks have"
        raise UserError(
            f"the budget for staged shards is {format_bytes(budget)} ({budget} bytes), and {number}"
            f" {format_bytes(needed)} ({needed} bytes); raise the budget or use more chunks"
        )


class Stager:
    """Keeps the shards of the present chunk, and of the next ones, on local disk.

    A visit is the training on one chunk: visit ``v = pass * K + position``, in the order of
    :func:`~lit_lora.datamodules.batches.plan.chunk_order`. Visits are waited for and passed in ascending order.

    One process per machine, a child of local rank 0, fetches and evicts; it ends with its parent, however that ends.
    What is staged stays when it ends, and a later run with the same folder goes on with it. Jobs that share a folder
    have slots of their own there, each with its own budget.

    Args:
        folder: Where shards are kept, on a local disk.
        budget: The most bytes that they take.
        shards: All shards of the data set.
        chunks: The shard numbers of each of the K chunks.
        seed: Decides the order of the chunks.
        shuffle: Whether each pass has an order of its own.
        job: A random name that all processes of the job share; letters, digits, ``_`` and ``-``.
        local_rank: The number of this process on this machine.
        local_world_size: How many processes of the job this machine has.

    Raises:
        UserError: If the budget is too small for two chunks, or two shards have the same location.
    """

    def __init__(
        self,
        folder: str | Path,
        budget: int,
        shards: Sequence[StagedShard],
        chunks: Sequence[Sequence[int]],
        seed: int,
        shuffle: bool,
        job: str,
        local_rank: int = 0,
        local_world_size: int = 1,
    ) -> None:
        sizes = [shard.size for shard in shards]
        check_budget([sum(sizes[shard] for shard in chunk) for chunk in chunks], budget)
        if not re.fullmatch(r"[\w-]+", job):
            raise UserError(f"job={job!r} cannot be part of a file name; use letters, digits, _ and -")
        self._folder = Path(folder).absolute()
        self._locations = [shard.location for shard in shards]
        self._names = [local_name(location) for location in self._locations]
        self._plan = StagingPlan(sizes, [[int(shard) for shard in chunk] for chunk in chunks], budget, seed, shuffle)
        self._job = job
        self._local_rank = local_rank
        self._local_world_size = local_world_size
        self._starts = 0
        self._slot: Path | None = None
        self._pid = -1
        self._passed = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._check_names()

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process knows where shards lie, but does not own the stager's process."""
        return {**self.__dict__, "_process": None}

    def start(self, visit: int) -> None:
        """Begin with the shards of this visit; all processes of the job do so. It can be done again after a close.

        Local rank 0 starts the process, the others find it.

        Raises:
            UserError: If the folder cannot be used, the disk is too small, or the process cannot be started.
        """
        assert self._process is None, "close() comes first"
        writable_folder(self._folder)
        self._starts += 1
        self._passed = visit - 1
        if self._local_rank == 0:
            self._process = self._start_process(visit)
        try:
            job = self._attach()
        except BaseException:
            self.close()
            raise
        self._pid = job["pid"]
        self._slot = slot_path(self._folder, job["slot"])

    def wait(self, visit: int) -> None:
        """Return when all shards of a visit are complete on local disk; they stay until it has been passed.

        Raises:
            UserError: If a shard cannot be fetched, the stager has ended, or its files were removed by somebody else.
        """
        self._check_room(visit)
        next_log = time.monotonic() + _FIRST_LOG_S
        while self._read_job()["ready"] < visit:
            if time.monotonic() >= next_log:
                next_log += _LOG_EVERY_S
                self._log_progress(visit)
            time.sleep(_POLL_S)
        missing = [shard for shard, present in self._presence(visit).items() if not present]
        if missing:
            raise UserError(
                f"{len(missing)} staged shards have vanished from {self._slot}, first {self.path(missing[0]).name};"
                " make sure that nothing else cleans this folder, then start again"
            )

    def path(self, shard: int) -> Path:
        """Where shard number ``shard`` lies, or will lie, on local disk. Works in copies in other processes too."""
        assert self._slot is not None, "start() comes first"
        return self._slot / self._names[shard]

    def passed(self, visit: int) -> None:
        """Say that this process has read all that it needs of this visit and of those before.

        Raises:
            UserError: If the disk is full or has been removed.
        """
        assert self._slot is not None, "start() comes first"
        self._passed = visit
        try:
            write_text(passed_path(self._slot, self._job_name, self._local_rank), str(visit))
        except OSError as error:
            raise UserError(f"cannot write in {self._slot}: {error.strerror}; mend that, then start again") from error

    def close(self) -> None:
        """End the stager's process, in local rank 0; the staged shards stay."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError), process.stdin:
            process.stdin.write(b"close\n")
        try:
            process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        job = read_job(self._job_path)
        if job is not None and job["state"] != "failed":  # other processes may have to read why it failed
            self._job_path.unlink(missing_ok=True)

    @property
    def _job_name(self) -> str:
        """A name of its own for each start, so that the state of an earlier one is not mistaken for this one's."""
        return f"{self._job}-{self._starts}"

    @property
    def _job_path(self) -> Path:
        return job_path(self._folder, self._job_name)

    def _check_names(self) -> None:
        name, number = Counter(self._names).most_common(1)[0]
        if number > 1:
            first, second = [loc for loc, n in zip(self._locations, self._names, strict=True) if n == name][:2]
            raise UserError(
                f"two shards have the same location but for user, query and fragment: {redact(first)}"
                f" and {redact(second)}; name each shard once, and rename shards that differ in these alone"
            )

    def _start_process(self, visit: int) -> subprocess.Popen[bytes]:
        config = StagerConfig(
            folder=str(self._folder),
            budget=self._plan.budget,
            locations=self._locations,
            sizes=list(self._plan.sizes),
            chunks=[list(chunk) for chunk in self._plan.chunks],
            seed=self._plan.seed,
            shuffle=self._plan.shuffle,
            job=self._job_name,
            local_world_size=self._local_world_size,
            visit=visit,
            parent=os.getpid(),
            by_main_thread=threading.current_thread() is threading.main_thread(),
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "lit_lora.datamodules.staging.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which is found out by its status
            # Not as an argument: URLs may hold credentials, and all users see arguments.
            process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
            process.stdin.flush()
        return process

    def _attach(self) -> dict[str, Any]:
        """Wait until the stager has started."""
        deadline = time.monotonic() + _ATTACH_S
        while True:
            ended = self._process is not None and self._process.poll() is not None
            job = read_job(self._job_path)
            if job is not None:
                self._check_state(job)
                return job
            if ended:
                raise UserError(_ENDED)
            if time.monotonic() > deadline:
                raise UserError(
                    f"no stager has started in {self._folder} within {_ATTACH_S:.0f} s; local rank 0 starts it,"
                    " so see what became of that process"
                )
            time.sleep(_POLL_S)

    def _read_job(self) -> dict[str, Any]:
        """The stager's state, if it is running."""
        alive = is_alive(self._pid) if self._process is None else self._process.poll() is None
        job = read_job(self._job_path)  # after the question whether it is alive: it may have left a reason
        if job is not None:
            self._check_state(job)
        if job is None or not alive:
            raise UserError(_ENDED)
        return job

    def _check_state(self, job: dict[str, Any]) -> None:
        if job["state"] == "failed":
            raise UserError(f"shards cannot be staged: {job['message']}")

    def _check_room(self, visit: int) -> None:
        """Check that the shards of a visit fit beside those before it, which stay while this process waits."""
        possible = self._plan.visits(self._passed + 1)
        if visit not in possible:
            raise UserError(
                f"visit {visit} was asked for before visit {self._passed + 1} was over, and only {len(possible)} of"
                f" their chunks fit the budget of {format_bytes(self._plan.budget)} together: the loader reads ahead"
                " over whole chunks; use fewer chunks, fewer workers or a larger budget"
            )

    def _presence(self, visit: int) -> dict[int, bool]:
        """Whether each shard of a visit is complete."""
        assert self._slot is not None
        with os.scandir(self._slot) as entries:
            there = {entry.name for entry in entries}
        return {shard: self._names[shard] in there for shard in self._plan.shards(range(visit, visit + 1))}

    def _log_progress(self, visit: int) -> None:
        presence = self._presence(visit)
        done = sum(self._plan.sizes[shard] for shard, present in presence.items() if present)
        total = sum(self._plan.sizes[shard] for shard in presence)
        _LOG.warning(
            "waiting for chunk %d: %d of %d shards (%s of %s)",
            self._plan.chunk(visit),
            sum(presence.values()),
            len(presence),
            format_bytes(done),
            format_bytes(total),
        )
