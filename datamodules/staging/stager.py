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
from lit_lora.datamodules.staging.config import StagerConfig
from lit_lora.datamodules.staging.files import (
    job_path,
    local_name,
    passed_path,
    read_job,
    slot_path,
    write_text,
)
from lit_lora.datamodules.staging.plan import StagingPlan
from lit_lora.datamodules.staging.slot import StagerSlot
from lit_lora.errors import UserError
from lit_lora.files import remedy, writable_folder
from lit_lora.machine import is_alive
from lit_lora.redact import redact

_LOG = logging.getLogger("lit_lora")
_POLL_S = 0.05
_ATTACH_S = 120.0
_CLOSE_S = 10.0
_FIRST_LOG_S = 10.0
_LOG_EVERY_S = 30.0
_ENDED = (
    "the process that stages shards has ended; if it printed no error above, it was killed, perhaps because the machine"
    " ran out of memory; start again"
)


@dataclass(frozen=True)
class StagedShard:
    """A shard to copy.

    Attributes:
        location: Path or URL of the shard.
        size: Size of the shard in bytes, from the index.
    """

    location: str
    size: int


def check_budget(chunk_bytes: Sequence[int], budget: int) -> None:
    """Check that any two chunks fit into the budget together.

    Args:
        chunk_bytes: Total size of the shards of each chunk in bytes.
        budget: Maximum total size of the staged shards in bytes.

    Raises:
        UserError: If the two largest chunks do not fit.
    """
    needed = sum(sorted(chunk_bytes)[-2:])
    if needed > budget:
        number = "the only chunk has" if len(chunk_bytes) == 1 else f"the two largest of {len(chunk_bytes)} chunks have"
        raise UserError(
            f"the budget for staged shards is {format_bytes(budget)} ({budget} bytes), but {number}"
            f" {format_bytes(needed)} ({needed} bytes); raise chunks.staging.budget or use more chunks"
        )


class Stager:
    """Keeps the shards of the current chunk and of the next ones on a local disk.

    A visit is the training on one chunk: visit ``v = pass * K + position``, in the order of
    :func:`~lit_lora.datamodules.batches.plan.chunk_order`. :meth:`wait` and :meth:`passed` are called in ascending order of
    visits.

    One staging process per machine, a child of local rank 0, fetches and evicts shards; it ends with its parent in any case.
    Staged shards remain when it ends, and a later run with the same folder reuses them. Jobs that share a folder have their own
    slots there, each with its own budget.

    Args:
        folder: Folder for the shards, on a local disk.
        budget: Maximum total size of the shards in bytes.
        shards: All shards of the data set.
        chunks: Shard numbers of each of the K chunks.
        seed: Seed of the order of the chunks.
        shuffle: Whether each pass has its own order.
        job: Random name that all processes of the job share; letters, digits, ``_`` and ``-``.
        local_rank: Number of this process on this machine. Defaults to 0.
        local_world_size: Number of processes of the job on this machine. Defaults to 1.

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
        self._slot_number = 0
        self._pid = -1
        self._passed = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._check_names()

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy in another process, which knows the paths but does not own the staging process."""
        return {**self.__dict__, "_process": None}

    def start(self, visit: int) -> None:
        """Start staging at a visit, in all processes of the job; this is possible again after :meth:`close`.

        Local rank 0 starts the staging process, to which the others attach.

        Raises:
            UserError: If the folder cannot be used, the disk is too small, or the staging process cannot be started.
        """
        assert self._process is None, "call close() first"
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
        self._slot_number = job["slot"]
        self._slot = slot_path(self._folder, self._slot_number)

    def wait(self, visit: int) -> None:
        """Wait until all shards of a visit are complete; they are kept until :meth:`passed` is called for the visit.

        Raises:
            UserError: If a shard cannot be fetched, the staging process has ended, or another program has removed its files.
        """
        self._check_room(visit)
        next_log = time.monotonic() + _FIRST_LOG_S
        while self._read_job()["ready"] < visit:
            if time.monotonic() >= next_log:
                next_log += _LOG_EVERY_S
                if self._local_rank == 0:  # the others wait for the same shards
                    self._log_progress(visit)
            time.sleep(_POLL_S)
        missing = [shard for shard, present in self._presence(visit).items() if not present]
        if missing:
            raise UserError(
                f"{len(missing)} staged shards were removed from {self._slot}, first {self.path(missing[0]).name};"
                " make sure that no other program cleans this folder, then start again"
            )

    def path(self, shard: int) -> Path:
        """Path of the local copy of a shard; this also works in copies of the stager in other processes."""
        assert self._slot is not None, "start() comes first"
        return self._slot / self._names[shard]

    def passed(self, visit: int) -> None:
        """Report that this process no longer needs the shards of this visit and of earlier ones.

        Raises:
            UserError: If the folder can no longer be written.
        """
        assert self._slot is not None, "start() comes first"
        self._passed = visit
        try:
            write_text(passed_path(self._slot, self._job_name, self._local_rank), str(visit))
        except OSError as error:
            raise UserError(
                f"cannot write to {self._slot}: {error.strerror}; {remedy(error)}, then start again"
            ) from error

    def close(self) -> None:
        """End the staging process, in local rank 0; the staged shards remain."""
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
        if self._slot is not None:  # the process ends while its threads download
            StagerSlot(self._folder, self._slot_number).clean_after_owner()
        job = read_job(self._job_path)
        if job is not None and job["state"] != "failed":  # other processes may still have to read the reason
            self._job_path.unlink(missing_ok=True)

    @property
    def _job_name(self) -> str:
        """Name of the job with the number of the start, so that the state of an earlier start is not read."""
        return f"{self._job}-{self._starts}"

    @property
    def _job_path(self) -> Path:
        return job_path(self._folder, self._job_name)

    def _check_names(self) -> None:
        name, number = Counter(self._names).most_common(1)[0]
        if number > 1:
            first, second = [loc for loc, n in zip(self._locations, self._names, strict=True) if n == name][:2]
            raise UserError(
                f"the locations of two shards differ at most in user, query or fragment: {redact(first)} and"
                f" {redact(second)}; name each shard once, and rename shards that differ only in these"
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
        with suppress(BrokenPipeError):  # the process has ended, which _attach reports
            # Not an argument, since URLs may contain credentials, and all users can see arguments.
            process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
            process.stdin.flush()
        return process

    def _attach(self) -> dict[str, Any]:
        """Wait until the staging process has started, and return its state."""
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
                    f"no staging process has started in {self._folder} within {_ATTACH_S:.0f} s; the process with local rank 0"
                    " starts it, so check its output"
                )
            time.sleep(_POLL_S)

    def _read_job(self) -> dict[str, Any]:
        """The state of the staging process, which must be running."""
        alive = is_alive(self._pid) if self._process is None else self._process.poll() is None
        job = read_job(self._job_path)  # after the check above, since an ended process may have left the reason
        if job is not None:
            self._check_state(job)
        if job is None or not alive:
            raise UserError(_ENDED)
        return job

    def _check_state(self, job: dict[str, Any]) -> None:
        if job["state"] == "failed":
            raise UserError(f"shards cannot be staged: {job['message']}")

    def _check_room(self, visit: int) -> None:
        """Check that the shards of a visit fit beside those of earlier visits that are still needed."""
        possible = self._plan.visits(self._passed + 1)
        if visit not in possible:
            raise UserError(
                f"visit {visit} was requested before visit {self._passed + 1} had ended, but only {len(possible)} of"
                f" their chunks fit the budget of {format_bytes(self._plan.budget)} together, since the loader reads ahead"
                " by whole chunks; use fewer chunks, fewer workers or a larger chunks.staging.budget"
            )

    def _presence(self, visit: int) -> dict[int, bool]:
        """The shards of a visit, each with whether it is complete."""
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
