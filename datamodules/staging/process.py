"""The process that copies shards to local disk ahead of training: ``python -m lit_lora.datamodules.staging.process``."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.indexing.scan import walk_members
from lit_lora.datamodules.remote.transfer import RemoteError, current_state, fetch_state
from lit_lora.datamodules.staging.config import StagerConfig
from lit_lora.datamodules.staging.files import (
    JOB_GLOB,
    job_path,
    local_name,
    passed_path,
    read_job,
    state_path,
    write_job,
)
from lit_lora.datamodules.staging.plan import StagingPlan
from lit_lora.datamodules.staging.slot import StagerSlot
from lit_lora.distributed.processes import end_with
from lit_lora.errors import UserError
from lit_lora.files import remedy, remove_unfinished, sync
from lit_lora.machine import host, is_alive
from lit_lora.redact import redact

_LOG = logging.getLogger("lit_lora")
_POLL_S = 0.1
_THREADS = 4
_TRIALS = 20
"""How often to try to write why staging failed."""
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class _Staging:
    """Keeps the shards of the current visit, and of as many later visits as fit the budget, in a slot.

    A file with the name and size of a shard is complete, since it is checked before it gets that name. A copy of an earlier run
    is used if the storage states the same of the shard as when it was copied. The total size of the complete shards and of the
    shards that are being fetched never exceeds the budget.
    """

    def __init__(self, config: StagerConfig, slot: StagerSlot) -> None:
        self._config = config
        self._slot = slot
        self._names = [local_name(location) for location in config.locations]
        self._plan = StagingPlan(config.sizes, config.chunks, config.budget, config.seed, config.shuffle)
        self._pool = ThreadPoolExecutor(_THREADS)
        self._running: dict[Future[None], int] = {}
        slot.clean()
        self._complete = slot.files()
        self._unchecked = set(self._complete)
        """Copies of earlier runs that were not yet compared with their source."""
        self._states: dict[str, str | None] = {}
        """What the storage stated of the shards that this run has copied or compared."""
        self._first = -1
        self._visits = range(0)
        self._wanted: dict[str, int] = {}
        self._next_use: dict[str, float] = {}
        self._peak = 0
        for name, size in zip(self._names, config.sizes, strict=True):
            if self._complete.get(name, size) != size:
                self._evict(name)
        self._look_ahead()
        self._make_room(0)
        self._check_disk()

    def step(self) -> None:
        """Collect finished downloads, evict shards and start further downloads.

        Raises:
            UserError: If a shard cannot be fetched.
            OSError: If the slot cannot be written.
        """
        for future in [future for future in self._running if future.done()]:
            shard = self._running.pop(future)
            future.result()
            self._complete[self._names[shard]] = self._config.sizes[shard]
        self._look_ahead()
        running = set(self._running.values())
        for name, shard in self._wanted.items():
            if len(self._running) == _THREADS:
                break
            if shard in running or (name in self._complete and name not in self._unchecked):
                continue
            if name in self._unchecked:
                self._unchecked.remove(name)
                del self._complete[name]
            elif not self._make_room(self._config.sizes[shard]):
                break
            self._running[self._pool.submit(self._bring, shard)] = shard
        self._peak = max(self._peak, self.size())

    def rest(self, closed: threading.Event) -> None:
        """Wait until a download has finished, but not longer than the polling interval."""
        if self._running:
            wait(self._running, _POLL_S, FIRST_COMPLETED)
        else:
            closed.wait(_POLL_S)

    def status(self) -> dict[str, int]:
        """The state for the training processes; all shards up to the visit ``ready`` are complete and will be kept."""
        ready = self._first - 1
        for visit in self._visits:
            if any(self._names[shard] not in self._complete for shard in self._plan.shards(range(visit, visit + 1))):
                break
            ready = visit
        return {"ready": ready, "bytes": self.size(), "peak_bytes": self._peak}

    def size(self) -> int:
        """Total size in bytes of the complete shards and of those that are being fetched."""
        return sum(self._complete.values()) + sum(self._config.sizes[shard] for shard in self._running.values())

    def abandon(self) -> None:
        """Start no further downloads and remove the unfinished ones."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with suppress(OSError):
            self._slot.clean()

    def _look_ahead(self) -> None:
        first = min(self._passed(rank) for rank in range(self._config.local_world_size)) + 1
        if first == self._first:
            return
        self._first = first
        self._visits = self._plan.visits(first)
        self._wanted = {self._names[shard]: shard for shard in self._plan.shards(self._visits)}
        self._next_use = dict(zip(self._names, self._plan.next_use(first), strict=True))

    def _passed(self, local_rank: int) -> int:
        try:
            return int(passed_path(self._slot.path, self._config.job, local_rank).read_text())
        except FileNotFoundError:
            return self._config.visit - 1

    def _make_room(self, size: int) -> bool:
        while self.size() + size > self._config.budget:
            idle = [name for name in self._complete if name not in self._wanted]
            if not idle:
                return False
            self._evict(max(idle, key=lambda name: self._next_use.get(name, math.inf)))
        return True

    def _evict(self, name: str) -> None:
        self._slot.remove(name)
        del self._complete[name]
        self._unchecked.discard(name)

    def _check_disk(self) -> None:
        """Raise an error at the start if the disk is smaller than the budget."""
        missing = min(self._config.budget, sum(self._config.sizes)) - self.size()
        if shutil.disk_usage(self._slot.path).free < missing:
            raise UserError(_too_little_disk(self._config, self.size()))

    def _bring(self, shard: int) -> None:
        """Copy a shard, unless there is a copy of it as it is now."""
        location, name = self._config.locations[shard], self._names[shard]
        path = self._slot.path / name
        before = self._states.get(name)
        if path.exists():
            try:
                stated = current_state(location)
            except RemoteError as error:
                if error.missing:
                    raise
                _LOG.warning("%s; the copy in %s is used as it is", error, path.parent)  # it may be all that is needed
                self._states[name] = before
                return
            with suppress(OSError):  # a copy of which nothing is known
                before = state_path(path).read_text()
                if before == (stated or ""):
                    self._states[name] = stated
                    return
            self._slot.remove(name)
        self._states[name] = state = self._fetch(shard, path)
        if before and state and before != state:
            _LOG.warning(
                "the storage states another version of %s than when it was last copied to %s; it was copied again: its members "
                "have the names and sizes in the index, but may hold other images or captions",
                redact(location),
                path.parent,
            )

    def _fetch(self, shard: int, path: Path) -> str | None:
        location, size = self._config.locations[shard], self._config.sizes[shard]
        part = path.with_name(path.name + ".part")
        for again in (True, False):
            state = fetch_state(location, part, size)
            try:
                _check_tar(part)
                break
            except UserError as error:
                part.unlink()
                if not again:
                    raise RemoteError(f"{redact(location)} cannot be staged: {error}") from None
        state_path(path).write_text(state or "")
        part.replace(path)
        sync(path.parent)
        return state


def serve(config: StagerConfig, closed: threading.Event) -> int:
    """Stage until ``closed`` is set or the parent has ended.

    Returns:
        Exit status: 0, or 1 if staging failed; the job's file then contains the reason.
    """
    folder = Path(config.folder)
    path = job_path(folder, config.job)
    staging: _Staging | None = None
    told: dict[str, Any] = {}
    try:
        slot = StagerSlot.claim(folder, config.parent)
        _remove_stale_jobs(folder)
        staging = _Staging(config, slot)
        while not closed.is_set() and os.getppid() == config.parent:
            staging.step()
            status = {"state": "running", "pid": os.getpid(), "slot": slot.number, **staging.status()}
            if status != told:
                write_job(path, **status)
                told = status
            staging.rest(closed)
        slot.clean()
        path.unlink(missing_ok=True)
        _remove_stale_jobs(folder)  # at the end, since the process of a killed run may outlive it by a moment
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = _describe(error, config, staging.size() if staging else 0)
    _tell(path, message, staging)
    return 1


def _tell(path: Path, message: str, staging: _Staging | None) -> None:
    """Write why staging failed, for the training processes to show; on a full disk that needs the room of unfinished shards."""
    for _ in range(_TRIALS):
        try:
            write_job(path, state="failed", pid=os.getpid(), message=message)
            return
        except OSError:
            if staging is not None:
                staging.abandon()
        time.sleep(_POLL_S)  # the threads close what they were writing
    print(message, file=sys.stderr)


def main() -> None:
    """Read the configuration from standard input and stage until the parent closes or ends."""
    # Signals from a scheduler or terminal are for the training process, which may need more shards before it ends.
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    config = StagerConfig(**json.loads(sys.stdin.buffer.readline()))
    if (
        config.by_main_thread
    ):  # end_with watches the starting thread; for other threads the loop in serve checks the parent
        end_with(config.parent)
    closed = threading.Event()
    threading.Thread(target=_listen, args=(closed,), daemon=True).start()
    status = 1
    try:
        status = serve(config, closed)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # without waiting for downloads


def _listen(closed: threading.Event) -> None:
    sys.stdin.buffer.readline()  # returns when the parent closes or ends
    closed.set()


def _remove_stale_jobs(folder: Path) -> None:
    remove_unfinished(folder, JOB_GLOB)
    for path in folder.glob(JOB_GLOB):
        job = read_job(path)
        if job is not None and job["host"] == host() and not is_alive(job["pid"]):
            path.unlink(missing_ok=True)


def _check_tar(path: Path) -> None:
    """Check the headers of a shard.

    Raises:
        UserError: If the shard is truncated, damaged or empty.
    """
    with path.open("rb") as file:
        if sum(1 for _ in walk_members(path, file)) == 0:
            raise UserError(f"{path} holds no samples")


def _describe(error: OSError, config: StagerConfig, size: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _too_little_disk(config, size)
    return f"cannot stage shards in {config.folder}: {error.strerror}; {remedy(error)}, or choose another chunks.staging.dir"


def _too_little_disk(config: StagerConfig, size: int) -> str:
    free = shutil.disk_usage(config.folder).free
    return (
        f"the disk of {config.folder} is too small: {format_bytes(size)} of the budget of {format_bytes(config.budget)} are"
        f" staged, but only {format_bytes(free)} are free; free space, lower chunks.staging.budget or choose another"
        " chunks.staging.dir"
    )


if __name__ == "__main__":
    main()
