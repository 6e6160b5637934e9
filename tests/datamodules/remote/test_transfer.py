from __future__ import annotations

import logging
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from contextlib import closing, nullcontext, suppress

import fsspec
import fsspec.asyn
import numpy as np
import pytest

from lit_lora.datamodules.remote import http_session
from lit_lora.datamodules.remote import transfer as remote
from lit_lora.datamodules.remote.pace import MIN_RATE, Pace
from lit_lora.datamodules.remote.remote_source import TransientError
from lit_lora.datamodules.remote.transfer import (
    RemoteError,
    RetryPolicy,
    exists,
    fetch,
    fetch_changed,
    is_remote,
    list_tars,
    object_size,
    ranged_size,
    read_range,
)
from lit_lora.errors import UserError
from lit_lora.redact import redact
from tests.datamodules.faulty_server import FaultyServer
from tests.s3_server import s3_environment, s3_server

QUICK = RetryPolicy(attempts=3, first_wait=0.01, longest_wait=0.05, timeout=5)
DATA = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(DATA)
    with closing(FaultyServer(tmp_path / "served")) as server:
        yield server


@pytest.fixture
def target(tmp_path):
    """Path to fetch to; after a failure neither it nor temporary files may exist."""
    (tmp_path / "local").mkdir()
    return tmp_path / "local" / "a.tar"


def _nothing_left(target):
    return list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("location", "remote"),
    [
        ("https://host/a.tar", True),
        ("s3://bucket/a.tar", True),
        ("simplecache::s3://bucket/a.tar", True),
        ("file:///data/a.tar", False),
        ("/data/a.tar", False),
        ("data/a:b.tar", False),
    ],
)
def test_is_remote(location, remote):
    assert is_remote(location) is remote


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://me:secret@host:80/a/b.tar?secret=1#secret", "https://host:80/a/b.tar"),
        ("https://host/b.tar?secret=x&to=https://e", "https://host/b.tar"),
        ("https://secret@host/@b://c.tar", "https://host/@b://c.tar"),
        ("https://[::1]:8000/b.tar", "https://[::1]:8000/b.tar"),
        ("https://me:sec?ret@host/b.tar", "https://..."),
        ("s3://KEY:sec/ret@bucket/b.tar", "s3://..."),
        ("zip://b.tar::https://me:secret@host/a.zip?secret", "zip://b.tar::https://host/a.zip"),
        ("simplecache::s3://bucket/{00..09}.tar", "simplecache::s3://bucket/{00..09}.tar"),
        ("abfs://container@account.dfs.core.windows.net/b.tar", "abfs://container@account.dfs.core.windows.net/b.tar"),
        ("abfs://me:secret@account/b.tar", "abfs://account/b.tar"),
        ("/data/a?b#c@d.tar", "/data/a?b#c@d.tar"),
        ("file:///data/a?b.tar", "file:///data/a?b.tar"),
    ],
)
def test_redacted(location, shown):
    assert redact(location) == shown


def test_waits_grow_to_the_longest_and_obey_the_server():
    policy = RetryPolicy(first_wait=1, factor=2, longest_wait=10, jitter=0)
    assert [policy.wait(failures) for failures in (1, 2, 3, 4, 5, 60)] == [1, 2, 4, 8, 10, 10]
    assert policy.wait(1, asked=5) == 5
    assert policy.wait(1, asked=5000) == 10
    jittered = {RetryPolicy(first_wait=1, jitter=0.25).wait(1) for _ in range(50)}
    assert len(jittered) > 10
    assert 0.75 <= min(jittered) < max(jittered) <= 1.25


def test_waiting_leaves_the_global_generator_alone():
    import random

    state = random.getstate()
    RetryPolicy().wait(1)
    assert random.getstate() == state


# --- http ---


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["truncate"],
        ["drop"],
        ["truncate", "drop"],
        [500],
        [429, 503],
        [408, 425],
        [502, 504],
        ["redirect"],
        ["truncate", "shift"],
        ["truncate", 416],
    ],
)
def test_fetch_survives_faults(server, target, faults, ranges):
    server.ranges = ranges
    server.faults.extend(faults)
    assert fetch(f"{server.url}/a.tar", target, len(DATA), QUICK) == len(DATA)
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("faults", [[], ["truncate"]])
@pytest.mark.parametrize(("chunked", "etags"), [(True, True), (False, False)])
def test_fetch_survives_faults_without_some_headers(server, target, faults, chunked, etags):
    server.chunked, server.etags = chunked, etags
    server.faults.extend(faults)
    fetch(f"{server.url}/a.tar", target, len(DATA), QUICK)
    assert target.read_bytes() == DATA


def test_stall_is_broken_off(server, target):
    server.faults.extend(["stall"])
    fetch(f"{server.url}/a.tar", target, len(DATA), RetryPolicy(attempts=10, first_wait=0.01, timeout=0.3))
    assert target.read_bytes() == DATA
    assert len(server.requests) >= 2  # more where the server itself was slower than the timeout


def test_interrupted_download_continues(server, target):
    server.faults.extend(["truncate", "truncate"])
    fetch(f"{server.url}/a.tar", target, len(DATA), QUICK)

    assert target.read_bytes() == DATA
    assert [request.headers.get("Range", "").partition("=")[2] != "" for request in server.requests] == [
        False,
        True,
        True,
    ]
    assert server.sent < len(DATA) + 2 * remote.PIECE_BYTES
    starts = [int(r.headers["Range"].removeprefix("bytes=").removesuffix("-")) for r in server.requests[1:]]
    assert 0 < starts[0] <= starts[1]


@pytest.mark.parametrize(
    ("changed", "etags", "conditions"),
    [
        *((changed, True, conditions) for changed in (DATA[::-1], DATA[:1000]) for conditions in (True, False)),
        *((changed, False, False) for changed in (DATA[:1000], DATA + b"more")),  # only the size tells these apart
    ],
    ids=[
        "same size",
        "same size, unconditional",
        "shorter",
        "shorter, unconditional",
        "no tag, shorter",
        "no tag, longer",
    ],
)
def test_changed_object_is_fetched_from_its_start(server, target, changed, etags, conditions):
    server.etags, server.conditions = etags, conditions
    server.faults.append("truncate")
    server.fault = lambda path: (server.folder / "a.tar").write_bytes(changed) and None
    assert fetch(f"{server.url}/a.tar", target, None, QUICK) == len(changed)
    assert target.read_bytes() == changed


def test_progress_restarts_the_count_of_attempts(server, target):
    server.faults.extend(["drop", "drop", "truncate", "drop"])
    fetch(f"{server.url}/a.tar", target, len(DATA), QUICK)
    assert target.read_bytes() == DATA
    assert len(server.requests) == 5

    server.requests.clear()
    server.faults.extend(["drop", "drop", "drop"])
    with pytest.raises(RemoteError, match="3 attempts in a row"):
        fetch(f"{server.url}/a.tar", target, len(DATA), QUICK)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "HTTP status 401; give credentials"),
        (403, "HTTP status 403; check the credentials and the permissions"),
        (404, "HTTP status 404; check the name"),
        (410, "HTTP status 410; check the name"),
        (400, "HTTP status 400; check the URL"),
        (405, "HTTP status 405; check the URL"),
        (416, "HTTP status 416; check the URL"),
        (501, "HTTP status 501; check the URL"),
    ],
)
def test_final_errors_are_not_retried(server, target, status, message):
    server.fault = status
    with pytest.raises(RemoteError, match=f"cannot read {server.url}/a.tar: {message}") as caught:
        fetch(f"{server.url}/a.tar", target, len(DATA), QUICK)
    assert caught.value.missing is (status in (404, 410))
    assert len(server.requests) == 1
    assert _nothing_left(target)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (503, "HTTP status 503"),
        (429, "HTTP status 429"),
        ("drop", "the connection broke"),
        ("truncate", "the connection broke"),
        ("short", "it has 2999990 bytes, but 3000000 in its index"),
    ],
)
def test_fails_after_all_attempts(server, target, fault, reason):
    server.fault = fault
    server.ranges = False
    with pytest.raises(RemoteError, match=rf"a.tar: ({reason}) \(3 attempts in a row\); "):
        fetch(f"{server.url}/a.tar", target, len(DATA), QUICK)
    assert len(server.requests) == 3
    assert _nothing_left(target)


def test_no_server(server, target):
    server.close()
    with pytest.raises(RemoteError, match=r"no connection to the server \(3 attempts in a row\); check the network"):
        fetch(f"{server.url}/a.tar", target, None, QUICK)
    assert _nothing_left(target)


def test_wrong_content_length(server, target):
    server.faults.append("long")
    fetch(f"{server.url}/a.tar", target, None, QUICK)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("size", [len(DATA) - 1, 10])
@pytest.mark.parametrize("chunked", [True, False])
def test_longer_than_indexed(server, target, size, chunked):
    server.chunked = chunked
    with pytest.raises(RemoteError, match=f"{size}.*not the shard that was indexed"):
        fetch(f"{server.url}/a.tar", target, size, QUICK)
    assert len(server.requests) == 1
    assert _nothing_left(target)


def test_shorter_than_indexed(server, target):
    with pytest.raises(RemoteError, match=r"3000000 bytes, but 3000001 in its index \(3 attempts in a row\).*indexed"):
        fetch(f"{server.url}/a.tar", target, len(DATA) + 1, QUICK)
    assert _nothing_left(target)


def test_compressed_answer(server, target):
    server.fault = "gzip"
    with pytest.raises(RemoteError, match="the server compresses it; turn off compression"):
        fetch(f"{server.url}/a.tar", target, None, QUICK)


def test_old_file_stays_when_fetching_fails(server, target):
    target.write_bytes(b"old")
    server.fault = "truncate"
    server.ranges = False
    with pytest.raises(RemoteError):
        fetch(f"{server.url}/a.tar", target, len(DATA), QUICK)
    assert target.read_bytes() == b"old"


def test_retry_after_is_obeyed(server, target, monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    server.faults.extend([429, 503, 500])
    server.retry_after = "7"
    fetch(f"{server.url}/a.tar", target, None, RetryPolicy(attempts=4, first_wait=0.5, jitter=0))
    assert waits == [7, 7, 2]

    server.faults.append(429)
    server.retry_after = "Fri, 31 Dec 2100 23:59:59 GMT"
    fetch(f"{server.url}/a.tar", target, None, RetryPolicy())
    assert waits[3] == 30


@pytest.mark.parametrize(("offset", "size"), [(0, 10), (1_500_000, 1_200_000), (2_999_990, 10), (5, 0)])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", [None, "drop", "truncate", 503, "shift"])
def test_range(server, offset, size, ranges, fault):
    server.ranges = ranges
    server.faults.append(fault)
    assert read_range(f"{server.url}/a.tar", offset, size, QUICK) == DATA[offset : offset + size]


@pytest.mark.parametrize(("offset", "size"), [(2_999_990, 11), (3_000_000, 1), (4_000_000, 10)])
@pytest.mark.parametrize("ranges", [True, False])
def test_range_beyond_the_end(server, offset, size, ranges):
    server.ranges = ranges
    with pytest.raises(RemoteError, match=f"before byte {offset + size}; this is not the shard that was indexed"):
        read_range(f"{server.url}/a.tar", offset, size, QUICK)


@pytest.mark.parametrize("ranges", [True, False])
def test_size_and_existence(server, ranges):
    server.ranges = ranges
    (server.folder / "empty.tar").write_bytes(b"")
    assert object_size(f"{server.url}/a.tar", QUICK) == len(DATA)
    assert object_size(f"{server.url}/empty.tar", QUICK) == 0
    assert ranged_size(f"{server.url}/a.tar", QUICK) == (len(DATA) if ranges else None)
    assert ranged_size(f"{server.url}/empty.tar", QUICK) is None
    assert exists(f"{server.url}/a.tar", QUICK)
    assert not exists(f"{server.url}/b.tar", QUICK)
    server.fault = 403
    with pytest.raises(RemoteError, match="403"):
        exists(f"{server.url}/a.tar", QUICK)


def test_size_that_the_server_does_not_state(server):
    server.ranges, server.chunked = False, True
    assert object_size(f"{server.url}/a.tar", QUICK) is None


def test_http_cannot_be_listed():
    with pytest.raises(UserError, match=r"https://host/shards cannot be listed.*braces"):
        list_tars("https://me:secret@host/shards?secret")


@pytest.mark.parametrize("fault", [None, 403, 500, "drop", "truncate", "gzip", "redirect", "long", "not there"])
def test_credentials_appear_in_no_message(server, target, fault, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    server.fault = 404 if fault == "not there" else fault
    server.ranges = False
    name = "nothing.tar" if fault == "not there" else "a.tar"
    location = f"{server.url.replace('://', '://user:hunter2@')}/{name}?X-Signature=tok3n#hunter2"
    texts = []
    for action in (
        lambda: fetch(location, target, len(DATA) + 1, QUICK),
        lambda: read_range(location, 10, len(DATA), QUICK),
        lambda: object_size(location, QUICK),
        lambda: ranged_size(location, QUICK),
    ):
        with suppress(UserError):
            try:
                action()
            except UserError as error:
                texts += traceback.format_exception(error)
                raise
    assert "Authorization" in server.requests[0].headers
    assert "tok3n" in server.requests[0].path
    shown = "".join([*texts, caplog.text, *capfd.readouterr(), *os.listdir(target.parent)])
    assert "127.0.0.1" in shown
    assert not re.search("hunter2|tok3n|secret", shown)


@pytest.mark.parametrize(
    "location", ["http:///a?hunter2", "http://me:hunter2@h:port/a?hunter2", "http://[::1/?hunter2", "https://x y"]
)
def test_no_url(location, target):
    with pytest.raises(RemoteError, match="cannot read http") as caught:
        fetch(location, target, None, QUICK)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_threads_have_their_own_connections(server):
    read = []

    def work(number):
        for i in range(5):
            read.append(read_range(f"{server.url}/a.tar", number * 100 + i, 3, QUICK) == DATA[number * 100 + i :][:3])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [True] * 20


# --- local files and fsspec ---


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_local_files(tmp_path, target, scheme):
    path = tmp_path / "a?b::c#d@e.tar"
    path.write_bytes(DATA)
    assert fetch(f"{scheme}{path}", target, len(DATA), QUICK) == len(DATA)
    assert target.read_bytes() == DATA
    assert read_range(f"{scheme}{path}", 7, 9, QUICK) == DATA[7:16]
    assert object_size(f"{scheme}{path}", QUICK) == ranged_size(f"{scheme}{path}", QUICK) == len(DATA)
    assert list_tars(f"{scheme}{tmp_path}") == [f"{scheme}{path}"]
    with pytest.raises(RemoteError, match="ends at byte 3000000"):
        read_range(f"{scheme}{path}", len(DATA) - 1, 2, QUICK)


def test_local_file_that_is_missing(tmp_path, target):
    with pytest.raises(RemoteError, match=r"nothing.tar: it does not exist; check") as caught:
        fetch(str(tmp_path / "nothing.tar"), target, 1, QUICK)
    assert caught.value.missing
    assert not exists(str(tmp_path / "nothing.tar"), QUICK)
    with pytest.raises(RemoteError, match="IsADirectoryError"):
        fetch(str(tmp_path), target, None, QUICK)
    assert _nothing_left(target)


def test_unwritable_target_is_not_the_source_s_fault(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file, not a folder; name another folder"):
        fetch(f"{server.url}/a.tar", tmp_path / "file" / "a.tar", None, QUICK)
    assert server.requests == []


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def test_other_schemes(memory, target):
    for name in ("b.tar", "a.tar", "c.txt"):
        memory.pipe(f"/train/{name}", DATA)
    assert fetch("memory://train/a.tar", target, len(DATA), QUICK) == len(DATA)
    assert target.read_bytes() == DATA
    found = list_tars("memory://train", QUICK)
    assert [read_range(location, 1, 2, QUICK) for location in found] == [DATA[1:3]] * 2
    assert found == sorted(found)
    assert list_tars("memory://train/b*", QUICK) == found[1:]
    with pytest.raises(UserError, match=r"memory://other contains no \*.tar; check the name"):
        list_tars("memory://other", QUICK)


def test_interruptions_of_other_schemes(memory, target, monkeypatch):
    """An interrupted download continues at the same byte, unless the file has changed."""
    memory.pipe("/a.tar", DATA)
    opened = []
    open_ = type(memory).open

    def breaking(self, path, mode="rb", **options):
        file = open_(self, path, mode, **options)
        if mode != "rb":
            return file
        opened.append(path)
        read = file.read

        def broken_read(size):
            if file.tell() < 1_000_000:
                return read(size)
            if len(opened) == 2:
                memory.pipe(path, DATA[::-1])
            raise TimeoutError

        if len(opened) < 3:
            file.read = broken_read
        return file

    monkeypatch.setattr(type(memory), "open", breaking)
    fetch("memory://a.tar", target, len(DATA), QUICK)
    assert target.read_bytes() == DATA[::-1]
    assert len(opened) == 3


def test_unknown_and_missing_packages(target):
    with pytest.raises(RemoteError, match=r"nonsense:// is not known to fsspec"):
        fetch("nonsense://host/a.tar", target, None, QUICK)


def test_missing_package_is_named(target, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r's3:// needs a package .* pip install "lit_lora\[s3\]"'):
        fetch("s3://bucket/a.tar", target, None, QUICK)


# --- S3 ---


@pytest.fixture
def s3(monkeypatch):
    """A loopback server that speaks S3; its buckets ``train`` and ``other``."""
    with s3_server(monkeypatch, "train") as client:
        for name in ("b.tar", "a.tar", "c.txt"):
            client.put_object(Bucket="train", Key=f"shards/{name}", Body=DATA)
        yield client


@pytest.mark.slow
def test_s3(s3, target):
    assert fetch("s3://train/shards/a.tar", target, len(DATA), QUICK) == len(DATA)
    assert target.read_bytes() == DATA
    assert read_range("s3://train/shards/a.tar", 1_500_000, 7, QUICK) == DATA[1_500_000:1_500_007]
    assert object_size("s3://train/shards/a.tar", QUICK) == len(DATA)
    assert ranged_size("s3://train/shards/a.tar", QUICK) == len(DATA)
    version = fetch_changed("s3://train/shards/a.tar", target, None, QUICK)
    assert version
    target.write_bytes(b"not copied again")
    assert fetch_changed("s3://train/shards/a.tar", target, version, QUICK) == version
    assert target.read_bytes() == b"not copied again"
    s3.put_object(Bucket="train", Key="shards/a.tar", Body=DATA[::-1])
    assert fetch_changed("s3://train/shards/a.tar", target, version, QUICK) not in (None, version)
    assert target.read_bytes() == DATA[::-1]
    s3.put_object(Bucket="train", Key="shards/a.tar", Body=DATA)
    found = ["s3://train/shards/a.tar", "s3://train/shards/b.tar"]
    for location in ("s3://train/shards", "s3://train/shards/", "s3://train/*/*.tar"):
        assert list_tars(location, QUICK) == found

    target.unlink()
    for location in ("s3://train/shards/no.tar", "s3://nobucket/a.tar"):
        with pytest.raises(RemoteError, match=f"cannot read {location}: it does not exist") as caught:
            fetch(location, target, None, QUICK)
        assert caught.value.missing
        assert not exists(location, QUICK)
    with pytest.raises(UserError, match=r"s3://nobucket contains no \*.tar; check the name of the folder or bucket"):
        list_tars("s3://nobucket", QUICK)
    with pytest.raises(RemoteError, match="ends at byte 3000000, before byte 3000005"):
        read_range("s3://train/shards/a.tar", 2_999_998, 7, QUICK)
    with pytest.raises(RemoteError, match="InvalidRange"):
        read_range("s3://train/shards/a.tar", 10_000_000, 7, QUICK)
    with pytest.raises(RemoteError, match="3000000 bytes, but 2999999 in its index"):
        fetch("s3://train/shards/a.tar", target, len(DATA) - 1, QUICK)
    assert _nothing_left(target)


@pytest.mark.slow
def test_no_s3_server(monkeypatch, target):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server(monkeypatch, "train"):
        pass
    with pytest.raises(RemoteError, match=r"no connection to the server \(3 attempts in a row\); check the network"):
        fetch("s3://train/shards/a.tar", target, None, QUICK)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # the next test has another server


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_s3_in_forked_processes(s3):
    """Forked processes lack the parent's connections, event loop and threads."""
    location = "s3://train/shards/a.tar"
    assert read_range(location, 0, 3, QUICK) == DATA[:3]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_read_to, args=(queue, location, offset)) for offset in (10, 20)]
    with fsspec.asyn.get_lock():  # as another thread of the parent might
        for worker in workers:
            worker.start()
    got = sorted(queue.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    queue.close()
    assert got == [(10, DATA[10:15]), (20, DATA[20:25])]
    assert read_range(location, 30, 3, QUICK) == DATA[30:33]


IMPATIENT = RetryPolicy(attempts=2, first_wait=0.01, longest_wait=0.01, timeout=1.0)


@pytest.mark.parametrize("chunked", [False, True])
def test_bytes_that_come_one_by_one(server, target, chunked):
    server.fault, server.chunked = "drip", chunked
    begin = time.monotonic()
    with pytest.raises(
        RemoteError, match=r"it sent \d+ bytes in \d s, and at least 16384 a second .* \(2 attempts in a row\)"
    ):
        fetch(f"{server.url}/a.tar", target, policy=IMPATIENT)
    with pytest.raises(RemoteError, match="at least 16384 a second"):
        read_range(f"{server.url}/a.tar", 0, 1000, IMPATIENT)
    assert time.monotonic() - begin < 60
    assert _nothing_left(target)


def test_header_that_comes_byte_by_byte(server, target):
    server.fault = "slow header"
    begin = time.monotonic()
    with pytest.raises(RemoteError, match=r"2 attempts in a row"):
        fetch(f"{server.url}/a.tar", target, policy=IMPATIENT)
    assert time.monotonic() - begin < 60


def test_silent_server(server, target):
    server.fault = "silent"
    with pytest.raises(RemoteError, match=r"the server does not answer \(2 attempts in a row\)"):
        fetch(f"{server.url}/a.tar", target, policy=IMPATIENT)


def test_object_without_an_end(server, target):
    server.fault = "endless"
    with pytest.raises(RemoteError, match="it has more than 5000000 bytes; check the name and the server"):
        fetch(f"{server.url}/a.tar", target, policy=QUICK, most=5_000_000)
    assert _nothing_left(target)
    assert server.sent < 100_000_000


@pytest.mark.parametrize(
    ("most", "is_fetched"), [(len(DATA), True), (len(DATA) - 1, False), (lambda _: len(DATA), True)]
)
def test_size_up_to_a_limit(server, target, most, is_fetched):
    with nullcontext() if is_fetched else pytest.raises(RemoteError, match="it has more than 2999999 bytes"):
        assert fetch(f"{server.url}/a.tar", target, policy=QUICK, most=most) == len(DATA)


@pytest.mark.parametrize("length", ["9" * 5000, "-5", "x"])
def test_nonsense_in_headers(server, target, length):
    """Python refuses to read numbers of thousands of digits."""
    server.length = length
    with suppress(RemoteError):
        assert fetch(f"{server.url}/a.tar", target, policy=IMPATIENT) == len(DATA)


def test_slow_reading_is_not_the_servers_fault():
    pace = Pace(1.0)
    for _ in range(9):
        pace.add(MIN_RATE, 0.4)
    with pytest.raises(TransientError, match="it sent 100 bytes in 2 s"):
        pace.add(100, 2.0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_http_in_forked_processes(server):
    """A shared connection would mix up the responses."""
    location = f"{server.url}/a.tar"
    assert read_range(location, 0, 3, QUICK) == DATA[:3]
    session = http_session.http_session()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(
        target=lambda: queue.put((read_range(location, 7, 5), http_session.http_session() is session))
    )
    worker.start()
    got = queue.get(timeout=300)
    worker.join()
    queue.close()
    assert got == (DATA[7:12], False)
    assert http_session.http_session() is session


def _read_to(queue, location, offset):
    queue.put((offset, read_range(location, offset, 5, QUICK)))


@pytest.fixture
def s3_faults(server, monkeypatch):
    """The faulty server as S3 storage for s3://bucket/a.tar."""
    for name, value in s3_environment(server.url).items():
        monkeypatch.setenv(name, value)
    (server.folder / "bucket").mkdir()
    (server.folder / "bucket" / "a.tar").write_bytes(DATA)
    yield server
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.slow
@pytest.mark.parametrize("faults", [[503], [None, "truncate"], ["drop", 500], [None, None, 429, None]])
def test_s3_that_fails_for_a_moment(s3_faults, target, faults):
    s3_faults.faults.extend(faults)
    fetch("s3://bucket/a.tar", target, len(DATA), QUICK)
    assert target.read_bytes() == DATA


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        (403, r"access is denied, PermissionError \(403\); check the credentials and the permissions", 1),
        (503, r"OSError \(503\) \(3 attempts in a row\)", 3),
    ],
)
def test_s3_that_refuses(s3_faults, target, fault, message, requests):
    s3_faults.fault = fault
    with pytest.raises(RemoteError, match=f"cannot read s3://bucket/a.tar: {message}") as caught:
        fetch("s3://bucket/a.tar", target, len(DATA), QUICK)
    assert len(s3_faults.requests) == requests
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert _nothing_left(target)


@pytest.mark.slow
def test_s3_without_credentials(s3_faults, target, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteError, match="access is denied, NoCredentialsError; check the credentials"):
        fetch("s3://bucket/a.tar", target, None, QUICK)
    assert s3_faults.requests == []
