from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from lit_lora.datamodules.staging import process as process_module
from lit_lora.datamodules.staging import stager as stager_module
from lit_lora.datamodules.staging.config import StagerConfig
from lit_lora.datamodules.staging.files import job_path, local_name, read_job, write_job
from lit_lora.datamodules.staging.process import _describe
from lit_lora.datamodules.staging.stager import StagedShard, Stager, check_budget
from lit_lora.errors import UserError
from lit_lora.machine import host, is_alive
from tests.datamodules.faulty_server import FaultyServer

pytestmark = pytest.mark.slow

SEED = 1


class Data:
    """Shards in a folder, also served over HTTP, in chunks of three."""

    def __init__(self, paths, server):
        self.paths = paths
        self.server = server
        self.sizes = [path.stat().st_size for path in paths]
        self.chunks = [list(range(start, start + 3)) for start in range(0, len(paths), 3)]
        self.budget = sum(sorted(sum(self.sizes[shard] for shard in chunk) for chunk in self.chunks)[-2:])

    def shards(self, remote=True):
        prefix = f"{self.server.url}/" if remote else f"{self.paths[0].parent}/"
        return [StagedShard(prefix + path.name, size) for path, size in zip(self.paths, self.sizes, strict=True)]

    def stager(self, folder, job="job", remote=True, **options):
        options = {"budget": self.budget, "shards": self.shards(remote), "chunks": self.chunks} | options
        return Stager(folder, seed=SEED, shuffle=True, job=job, **options)

    def requested(self):
        """Names of the shards that were copied, once for each request."""
        asked = [request for request in self.server.requests if request.headers.get("Range") != "bytes=0-0"]
        return sorted(request.path.rpartition("/")[2] for request in asked)

    def is_staged(self, stager, visit):
        return all(
            stager.path(shard).read_bytes() == self.paths[shard].read_bytes()
            for shard in self.chunks[stager._plan.chunk(visit)]
        )


@pytest.fixture
def data(make_shards):
    paths = make_shards(*[1, 2, 3] * 4)
    with closing(FaultyServer(paths[0].parent)) as server:
        yield Data(paths, server)


@pytest.fixture
def stage(tmp_path):
    return tmp_path / "stage"


def _job(stager):
    return json.loads(stager._job_path.read_text())


def _until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


@contextmanager
def _size_watched(folder, sizes):
    """Measure the size of a folder's slots repeatedly."""
    done = threading.Event()

    def watch():
        while not done.is_set():
            total = 0
            for path in folder.glob("lit_lora-slot-*/*-shard-*"):
                with suppress(FileNotFoundError):  # renamed or evicted since
                    total += path.stat().st_size
            sizes.append(total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_folder_that_is_removed_while_it_is_used_is_told(data, stage):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(0)
        stager._process.kill()
        shutil.rmtree(stage)
        with pytest.raises(UserError, match="No such file or directory; leave the folder alone while a run uses it"):
            stager.passed(0)


@pytest.mark.parametrize("remote", [True, False])
def test_every_visit_finds_its_shards_within_the_budget(data, stage, remote):
    sizes = []
    with closing(data.stager(stage, remote=remote)) as stager, _size_watched(stage, sizes):
        stager.start(0)
        for visit in range(3 * len(data.chunks)):
            stager.wait(visit)
            assert data.is_staged(stager, visit)
            stager.passed(visit)
        job = _job(stager)

    assert data.budget * 0.6 < max(sizes) <= data.budget
    assert max(sizes) <= job["peak_bytes"] <= data.budget
    assert job["bytes"] <= data.budget < sum(data.sizes)
    assert not is_alive(job["pid"])
    assert not list(stage.glob("*.json"))
    assert not list(stage.glob("*/*.part"))


def test_next_chunk_comes_while_the_present_one_is_in_use(data, stage):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(1)
        assert data.is_staged(stager, 0)
        assert data.is_staged(stager, 1)


def test_starts_in_the_middle_of_a_run(data, stage):
    with closing(data.stager(stage)) as stager:
        stager.start(11)
        stager.wait(11)
        assert data.is_staged(stager, 11)
        expected = {data.paths[shard].name for shard in stager._plan.shards(range(11, 13))}
        stager.wait(12)
        assert set(data.requested()) == expected


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_shards_that_fit_are_fetched_once(data, stage, num_chunks):
    chunks = [list(range(12))] if num_chunks == 1 else data.chunks
    with closing(data.stager(stage, chunks=chunks, budget=sum(data.sizes))) as stager:
        stager.start(0)
        for visit in range(3 * num_chunks):
            stager.wait(visit)
            stager.passed(visit)
        stager.wait(3 * num_chunks)
    assert data.requested() == sorted(path.name for path in data.paths)


def test_slower_process_protects_its_chunk(data, stage):
    fast, slow = (data.stager(stage, local_rank=rank, local_world_size=2) for rank in range(2))
    with closing(fast), closing(slow):
        threads = [threading.Thread(target=stager.start, args=(0,)) for stager in (slow, fast)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert fast.path(0) == slow.path(0)
        for visit in range(2):
            fast.wait(visit)
            fast.passed(visit)
        waiting = threading.Thread(target=fast.wait, args=(2,))
        waiting.start()
        time.sleep(0.4)  # time enough for the stager to do wrong
        assert waiting.is_alive()
        assert data.is_staged(slow, 0)
        assert data.is_staged(slow, 1)
        slow.wait(0)
        slow.passed(0)
        waiting.join(120)
        assert not waiting.is_alive()
        assert data.is_staged(fast, 2)


def test_jobs_in_one_folder_do_not_disturb_each_other(data, stage):
    first, second = data.stager(stage, "first"), data.stager(stage, "second")
    with closing(first):
        first.start(0)
        with closing(second):
            second.start(3)
            assert first.path(0).parent != second.path(0).parent
            for visit in range(4):
                first.wait(visit)
                second.wait(3 + visit)
                assert data.is_staged(first, visit)
                assert data.is_staged(second, 3 + visit)
                first.passed(visit)
                second.passed(3 + visit)
        first.wait(4)
        assert data.is_staged(first, 4)


def test_started_again_after_a_close(data, stage):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        for visit in range(2):
            stager.wait(visit)
            stager.passed(visit)
        stager.close()
        stager.close()
        stager.start(0)
        stager.wait(0)
        assert data.is_staged(stager, 0)


PARENT = """
import os, pickle, sys, time
stager = pickle.load(open(sys.argv[1], "rb"))
stager.start(0)
worker = os.fork()  # has the pipe to the stager too, as workers of a loader do
if worker == 0:
    time.sleep(600)
print(stager._pid, worker, flush=True)
if sys.argv[2] == "exit":
    sys.exit()
time.sleep(600)
"""


@contextmanager
def _parent(tmp_path, stager, ending):
    """A process that starts a stager and ends before its own worker; yields the id of the staging process."""
    (tmp_path / "stager.pickle").write_bytes(pickle.dumps(stager))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "stager.pickle"), ending]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        stager, worker = map(int, parent.stdout.readline().split())
        try:
            yield stager
        finally:
            if ending == "kill":
                parent.kill()
            _until(lambda: not is_alive(stager))
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("ending", ["kill", "exit"])
def test_ends_with_its_parent_and_can_be_resumed(data, stage, tmp_path, ending):
    stager = data.stager(stage)
    held = data.paths[stager._plan.shards(range(2))[1]].name
    data.server.fault = lambda path: "stall" if path == f"/{held}" else None
    with _parent(tmp_path, stager, ending):
        if ending == "kill":
            _until(lambda: len(list(stage.glob("*/*.tar"))) == 5 and list(stage.glob(f"*/*{held}*.part")))
    data.server.fault = None
    data.server.requests.clear()
    with closing(data.stager(stage, job="again")) as stager:
        stager.start(0)
        assert stager.path(0).parent.name == "lit_lora-slot-0"
        assert [path.name for path in stage.glob("*.json")] == [stager._job_path.name]
        stager.wait(1)
        assert data.is_staged(stager, 0)
        assert data.is_staged(stager, 1)
        assert not list(stage.glob("*/*.part"))
    if ending == "kill":
        assert data.requested() == [held]


def test_nothing_unfinished_remains(data, stage):
    """Not even of a staging process that has no time to clean up."""
    data.server.fault = "stall"
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        _until(lambda: list(stage.glob("*/*.part")))
        os.kill(stager._pid, signal.SIGKILL)
    assert [path.name for path in stage.glob("*/*")] == ["lock"]
    assert [path.name for path in stage.iterdir()] == ["lit_lora-slot-0"]


def test_foreign_files_are_not_touched(data, stage, tmp_path):
    slot = stage / "lit_lora-slot-0"
    slot.mkdir(parents=True)
    outside = tmp_path / "outside.tar"
    outside.write_bytes(b"precious")
    hexadecimal = "0123456789abcdef"
    kept = [
        stage / "mine.tar",
        stage / f"{hexadecimal}-mine.tar",
        stage / "lit_lora-job-mine.json",
        slot / "mine.tar",
        slot / "mine.tar.part",
        slot / "passed",
        slot / f"{hexadecimal}-folder.tar" / "mine.tar",
        slot / f"{hexadecimal}-folder.tar.part" / "mine.tar",
    ]
    text = json.dumps({"format": "mine", "host": host(), "pid": 2**30})
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    links = [slot / f"{hexadecimal}-link.tar", slot / f"{hexadecimal}-link.tar.part", slot / "passed-job-0"]
    for link in links:
        link.symlink_to(outside)
    (stage / "lit_lora-slot-1").symlink_to(tmp_path)

    with closing(data.stager(stage, "a")) as first, closing(data.stager(stage, "b")) as second:
        for stager in (first, second):
            stager.start(0)
        assert second.path(0).parent.name == "lit_lora-slot-2"
        for visit in range(5):
            first.wait(visit)
            first.passed(visit)

    assert [path.read_text() for path in kept] == [text] * len(kept)
    assert all(link.is_symlink() for link in links)
    assert outside.read_bytes() == b"precious"


def test_shards_of_other_data_are_evicted_first(data, stage):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(1)
        slot = stager.path(0).parent
    old = slot / "0123456789abcdef-old.tar"
    old.write_bytes(bytes(data.budget - sum(p.stat().st_size for p in slot.glob("*.tar")) + 1000))
    kept = sorted(p.name for p in slot.glob("*.tar") if p != old)
    data.server.requests.clear()
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(1)
        assert sorted(p.name for p in slot.glob("*.tar")) == kept
        assert _job(stager)["peak_bytes"] <= data.budget
    assert data.requested() == []


def test_shards_needed_last_are_evicted_first(data, stage):
    with closing(data.stager(stage, budget=sum(data.sizes))) as stager:
        stager.start(0)
        stager.wait(3)
    visits = [data.chunks[stager._plan.chunk(visit)] for visit in range(4)]
    with closing(data.stager(stage, budget=data.budget + max(data.sizes))) as stager:
        stager.start(0)
        left = [sum(stager.path(shard).exists() for shard in shards) for shards in visits]
    assert left[:2] == [3, 3]
    assert 1 <= left[2] <= 2
    assert left[3] == 0


def test_needed_shards_are_not_evicted_for_other_downloads(data, stage):
    stager = data.stager(stage)
    visits = [[data.paths[shard].name for shard in data.chunks[stager._plan.chunk(visit)]] for visit in range(4)]
    data.server.faults.append("stall")
    with closing(stager):
        stager.start(0)
        _until(lambda: data.server.stalling)
        stager.passed(1)  # although the first shard is still on its way, and now takes room for nothing
        _until(lambda: len([name for name in data.requested() if name in visits[2] + visits[3]]) >= 4)
        time.sleep(0.3)  # time enough for the stager to do wrong
        data.server.released.set()
        stager.wait(3)
        assert data.is_staged(stager, 2)
        assert data.is_staged(stager, 3)
        assert _job(stager)["peak_bytes"] <= data.budget
    assert [name for name in data.requested() if name in visits[2] + visits[3]] == sorted(visits[2] + visits[3])


def test_file_of_another_size_is_fetched_again(data, stage):
    stager = data.stager(stage)
    shard = data.chunks[stager._plan.chunk(0)][0]
    path = stage / "lit_lora-slot-0" / local_name(stager._locations[shard])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    with closing(stager):
        stager.start(0)
        stager.wait(0)
        assert data.is_staged(stager, 0)


@pytest.mark.parametrize("remote", [True, False])
def test_shard_that_was_replaced_after_it_was_copied(data, stage, remote, capfd):
    """Another caption of the same number of bytes: names and sizes are those in the index."""
    with closing(data.stager(stage, remote=remote)) as stager:
        stager.start(0)
        stager.wait(0)
    shard, kept = data.chunks[stager._plan.chunk(0)][:2]
    path = data.paths[shard]
    path.write_bytes(path.read_bytes().replace(b"caption", b"another"))
    os.utime(path, (0, 0))
    data.server.requests.clear()
    with closing(data.stager(stage, remote=remote)) as stager:
        stager.start(0)
        stager.wait(0)
        assert data.is_staged(stager, 0)
        assert b"another" in (stage / "lit_lora-slot-0" / local_name(stager._locations[shard])).read_bytes()
    assert f"another version of {stager._locations[shard]} than when it was last copied" in capfd.readouterr().err
    assert data.paths[kept].name not in data.requested()


def test_copies_are_used_while_the_server_refuses(data, stage, capfd):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(1)
    data.server.fault = lambda path: 403
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(0)
        assert data.is_staged(stager, 0)
    assert "is used as it is" in capfd.readouterr().err


def test_shard_that_is_replaced_between_two_visits(data, stage, capfd):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(0)
        first = data.chunks[stager._plan.chunk(0)]
        for number in first:
            path = data.paths[number]
            path.write_bytes(path.read_bytes().replace(b"caption", b"another"))
            os.utime(path, (0, 0))
        again = next(visit for visit in range(4, 8) if stager._plan.chunk(visit) == stager._plan.chunk(0))
        for visit in range(again + 1):
            stager.wait(visit)
            stager.passed(visit)
    assert capfd.readouterr().err.count("than when it was last copied") == len(first)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (403, r"cannot read http://127.0.0.1:\d+/shard-0000\d\d.tar: HTTP status 403; check the credentials"),
        ("long", r"cannot read .*: it has \d+ bytes, but \d+ in its index; this is not the shard that was indexed"),
        ("not tar", r"http://127.0.0.1:\d+/shard-0000\d\d.tar cannot be staged: .*holds no samples"),
    ],
)
def test_failure_reaches_every_process(data, stage, fault, reason, capfd):
    shards = [
        StagedShard(shard.location.replace("://", "://me:hunter2@") + "?token=hunter2", shard.size)
        for shard in data.shards()
    ]
    stagers = [data.stager(stage, shards=shards, local_rank=rank, local_world_size=2) for rank in range(2)]
    bad = f"/{data.paths[data.chunks[stagers[0]._plan.chunk(1)][0]].name}"
    started = threading.Event()  # a process that starts after the failure is told of it at once
    data.server.fault = lambda path: fault if path.startswith(bad) and started.wait(120) else None
    with closing(stagers[0]), closing(stagers[1]):
        for stager in stagers:
            stager.start(0)
        pid = stagers[0]._pid
        assert b"hunter2" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        started.set()
        for stager in stagers:
            with pytest.raises(UserError, match=f"shards cannot be staged: {reason}") as caught:
                stager.wait(1)
            assert "hunter2" not in str(caught.value)
        _until(lambda: not is_alive(pid))
    left = [path.name for path in stage.rglob("*")] + [path.read_text() for path in stage.glob("*.json")]
    assert "hunter2" not in "".join([*left, *capfd.readouterr()])
    assert not list(stage.glob(f"*/*{bad.strip('/')}"))


def test_shard_damaged_in_transfer_is_fetched_again(data, stage):
    data.server.faults.append("not tar")
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(1)
        assert data.is_staged(stager, 0)
        assert data.is_staged(stager, 1)
    assert len(data.requested()) == 7


def test_stager_that_is_killed(data, stage):
    stagers = [data.stager(stage, local_rank=rank, local_world_size=2) for rank in range(2)]
    data.server.fault = "stall"
    with closing(stagers[0]), closing(stagers[1]):
        for stager in stagers:
            stager.start(0)
        os.kill(stagers[0]._pid, signal.SIGKILL)
        for stager in reversed(stagers):
            with pytest.raises(UserError, match="the process that stages shards has ended"):
                stager.wait(0)


def test_signals_are_for_the_parent(data, stage):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(stager._pid, number)
        for visit in range(3):
            stager.wait(visit)
            stager.passed(visit)


def test_copy_in_another_process_knows_the_paths(data, stage):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        copy = pickle.loads(pickle.dumps(stager))
        copy.close()
        assert [copy.path(shard) for shard in range(12)] == [stager.path(shard) for shard in range(12)]
        assert len({path.name for path in map(stager.path, range(12))}) == 12
        stager.wait(0)


def test_long_wait_is_logged_once_on_a_machine(data, stage, caplog, monkeypatch):
    monkeypatch.setattr(stager_module, "_FIRST_LOG_S", 0.0)
    stager, other = (data.stager(stage, local_rank=rank, local_world_size=2) for rank in range(2))
    chunk = stager._plan.chunk(0)
    held = data.chunks[chunk][1]
    data.server.fault = lambda path: "stall" if path == f"/{data.paths[held].name}" else None
    reasons = []

    def wait(one):
        try:
            one.wait(0)
        except UserError as error:
            reasons.append(str(error))

    with caplog.at_level(logging.INFO, "lit_lora"), closing(stager):
        stager.start(0)
        _until(lambda: len(list(stage.glob("*/*.tar"))) == 5)
        other.start(0)
        threads = [threading.Thread(target=wait, args=[one]) for one in (other, stager)]
        for thread in threads:
            thread.start()
        _until(lambda: caplog.records)
        stager.close()
        for thread in threads:
            thread.join()
    total, done = sum(data.sizes[s] for s in data.chunks[chunk]), data.sizes[data.chunks[chunk][0]]
    done += data.sizes[data.chunks[chunk][2]]
    assert caplog.messages == [
        f"waiting for chunk {chunk}: 2 of 3 shards ({done / 1000:.1f} kB of {total / 1000:.1f} kB)"
    ]
    assert len(reasons) == 2


def test_shards_that_somebody_removes(data, stage):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(0)
        for shard in range(12):
            stager.path(shard).unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"3 staged shards were removed from .*no other program cleans this folder"):
            stager.wait(0)


def test_reading_ahead_over_whole_chunks_is_refused(data, stage):
    with closing(data.stager(stage)) as stager:
        stager.start(0)
        with pytest.raises(
            UserError, match=r"visit 2 was requested before visit 0 had ended, but only 2 of their chunks"
        ):
            stager.wait(2)


def test_disk_that_is_smaller_than_the_budget(data, stage):
    shards = [StagedShard(shard.location, 10**15) for shard in data.shards()]
    stager = data.stager(stage, shards=shards, budget=7 * 10**15)
    with closing(stager), pytest.raises(UserError, match=r"the disk of .* is too small: 0 B of the budget of 7.0 PB"):
        stager.start(0)
    assert data.requested() == []


def test_disk_that_is_full_is_told_apart_from_other_errors(tmp_path):
    config = StagerConfig(str(tmp_path), 10**9, [], [], [], 0, True, "job", 1, 0, 1, True)
    full = _describe(OSError(errno.ENOSPC, "No space left"), config, 5 * 10**8)
    assert "500.0 MB of the budget of 1.0 GB are staged, but only" in full
    read_only = _describe(OSError(errno.EROFS, "Read-only file system"), config, 0)
    assert "Read-only file system; the disk is mounted for reading only" in read_only
    assert "space" not in read_only


@pytest.mark.parametrize(
    ("number", "todo"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "change the permissions there"),
        (errno.EIO, "check the disk"),
        (errno.ENOTDIR, "a file has the name of a folder there"),
        (errno.ESTALE, "the network disk has lost the file: mount it again"),
    ],
)
def test_what_a_process_cannot_report_has_its_own_remedy(data, stage, monkeypatch, number, todo):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with closing(data.stager(stage)) as stager:
        stager.start(0)
        stager.wait(0)
        monkeypatch.setattr("lit_lora.datamodules.staging.stager.write_text", refuse)
        with pytest.raises(UserError, match=f"{os.strerror(number)}; {todo}.*, then start again"):
            stager.passed(0)


def test_the_reason_is_told_once_though_the_disk_is_full(data, stage, monkeypatch, capsys):
    """Even the few bytes of the reason find no room until the shards that are being fetched have made some."""
    started = threading.Event()

    def fetch_state(location, path, size):
        path.write_bytes(b"the first bytes")
        if started.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        started.set()
        time.sleep(0.3)

    def write(path, **values):
        if list(stage.glob("*/*.part")):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_job(path, **values)

    monkeypatch.setattr(process_module, "fetch_state", fetch_state)
    monkeypatch.setattr(process_module, "write_job", write)
    stage.mkdir()
    shards = data.shards()
    config = StagerConfig(
        folder=str(stage),
        budget=data.budget,
        locations=[shard.location for shard in shards],
        sizes=data.sizes,
        chunks=data.chunks,
        seed=SEED,
        shuffle=True,
        job="job",
        local_world_size=1,
        visit=0,
        parent=os.getppid(),
        by_main_thread=True,
    )
    assert process_module.serve(config, threading.Event()) == 1
    job = read_job(job_path(stage, "job"))
    assert job["state"] == "failed"
    assert "is too small" in job["message"]
    assert capsys.readouterr().err == ""


def test_folder_that_cannot_be_used(data, tmp_path):
    (tmp_path / "file").write_text("")
    with closing(data.stager(tmp_path / "file" / "stage")) as stager, pytest.raises(UserError, match="cannot create"):
        stager.start(0)


def test_no_stager_to_find(data, stage, monkeypatch):
    monkeypatch.setattr(stager_module, "_ATTACH_S", 0.0)
    with pytest.raises(UserError, match="no staging process has started"):
        data.stager(stage, local_rank=1, local_world_size=2).start(0)


@pytest.mark.parametrize(
    ("chunk_bytes", "budget", "message"),
    [
        (
            [3, 5, 4],
            8,
            r"8 B \(8 bytes\), but the two largest of 3 chunks have 9 B \(9 bytes\); raise chunks.staging.budget",
        ),
        ([7], 6, r"6 B \(6 bytes\), but the only chunk has 7 B \(7 bytes\)"),
    ],
)
def test_budget_that_is_too_small(chunk_bytes, budget, message):
    with pytest.raises(UserError, match=message):
        check_budget(chunk_bytes, budget)


@pytest.mark.parametrize(("chunk_bytes", "budget"), [([3, 5, 4], 9), ([7], 7)])
def test_budget_that_suffices(chunk_bytes, budget):
    check_budget(chunk_bytes, budget)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 10}, "the budget for staged shards is 10 B"),
        ({"job": "../x"}, r"job='../x' cannot be part of a file name"),
        (
            {
                "shards": [StagedShard("https://a@h/x.tar?1", 1), StagedShard("https://h/x.tar?2", 1)],
                "chunks": [[0, 1]],
            },
            "locations of two shards differ at most in .*: https://h/x.tar and https://h/x.tar; name each shard once",
        ),
    ],
)
def test_wrong_arguments(data, stage, changes, message):
    with pytest.raises(UserError, match=message):
        data.stager(stage, **changes)


def test_names_tell_locations_apart_and_keep_secrets(tmp_path, monkeypatch):
    assert local_name("https://me:pw@h/a/x.tar?sig=1") == local_name("https://h/a/x.tar")
    assert local_name("https://h/a/x.tar") != local_name("https://h/b/x.tar")
    assert local_name("https://h/a/x%20y;z.tar").endswith("-x_20y_z.tar")
    assert len(local_name("s3://b/" + 300 * "x" + ".tar")) < 130
    names = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        names.append(local_name("x.tar"))
        assert names[-1] == local_name(f"{tmp_path}/{folder}/x.tar") == local_name(f"file://{tmp_path}/{folder}/x.tar")
    assert names[0] != names[1]


def test_process_starts_fast():
    """It does not import packages that take seconds to import."""
    slow = "{'torch', 'lightning', 'requests', 'fsspec'}"
    code = f"import sys, lit_lora.datamodules.staging.process; print({slow} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_job_of_another_machine_is_not_this_one_s(stage, monkeypatch):
    here = job_path(stage, "job")
    monkeypatch.setattr("platform.node", lambda: "else/where")
    assert job_path(stage, "job") != here
    assert job_path(stage, "job").parent == stage
