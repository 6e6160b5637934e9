from __future__ import annotations

import gzip
import pickle
import shutil
import threading
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest
import torch

from lit_lora.datamodules.decoding.decode import decode_rgb
from lit_lora.datamodules.decoding.framing import Framing
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.streaming import shard_stream
from lit_lora.datamodules.streaming.shard_stream import ShardStream
from tests.datamodules.faulty_server import FaultyServer

REST = "(the rest of the shard)"


def _stream(shards, resampled=False, seed=4, decoder=None, **options):
    decoder = decoder or ImageDecoder(random_flip=True).with_seed(seed)
    return ShardStream([str(shard) for shard in shards], decoder, (8, 8), 2, resampled, seed=seed, **options)


def _read_all(stream):
    """Key and caption of each sample, and key and reason of each bad sample."""
    batches = list(stream)
    samples = [
        (key, caption)
        for batch in batches[:-1]
        for key, caption, weight in zip(batch["key"], batch["caption"], batch["weight"], strict=True)
        if weight
    ]
    return samples, [(report.key, report.reason) for batch in batches for report in batch["bad"]]


def _numbers(*numbers):
    return [(f"{number:04}", f"caption {number:04}") for number in numbers]


def test_a_batch(make_shards):
    stream = _stream(make_shards(3))
    first, second, end = list(stream)
    assert end == {"bad": []}
    assert first["pixel_values"].dtype == torch.uint8
    assert first["pixel_values"].shape == (2, 3, 8, 8)
    assert first["caption"] == ["caption 0000", "caption 0001"]
    for name, row in {"original_size": [16, 24], "target_size": [8, 8]}.items():
        assert first[name].dtype == torch.int64
        assert first[name].tolist() == [row, row]
    assert first["crop_top_left"].shape == (2, 2)
    assert first["weight"].dtype == torch.float32
    assert first["weight"].tolist() == [1, 1]
    assert first["slot"] == [0, 1]
    assert second["key"] == ["0002", "0002"]
    assert second["weight"].tolist() == [1, 0]


def test_pixels_are_those_of_the_slot(make_shards, encode_image):
    batch = next(iter(_stream(make_shards(2))))
    for place in range(2):
        framed = Framing(False, True, 4)(decode_rgb(encode_image(seed=place)), place, (8, 8))
        assert torch.equal(batch["pixel_values"][place], framed.pixels)
        assert tuple(batch["crop_top_left"][place].tolist()) == framed.crop_top_left


def test_each_shard_once_over_all_processes(make_shards):
    shards = make_shards(3, 1, 2, 4, 2)
    parts = [_read_all(_stream(shards, rank=rank, world_size=3))[0] for rank in range(3)]
    assert sorted(parts[0] + parts[1] + parts[2]) == _numbers(*range(12))
    assert _read_all(_stream(shards[:1], rank=2, world_size=3)) == ([], [])


def test_slots_are_unique_over_processes_and_after_a_restart(make_shards):
    slots = []
    for rank in range(2):
        stream = _stream(make_shards(5), resampled=True, rank=rank, world_size=2)
        for start in ((0, 0), (4, 16)):
            stream.start = start
            slots += [slot for batch in islice(stream, 4) for slot in batch["slot"]]
    assert sorted(slots) == list(range(32))


def test_draws_of_shards_are_reproducible_and_differ_between_processes(make_shards):
    shards = make_shards(*[1] * 12)

    def keys(rank=0, start=(0, 0), seed=4):
        stream = _stream(shards, resampled=True, rank=rank, world_size=2, seed=seed)
        stream.start = start
        return [batch["key"] for batch in islice(stream, 8)]

    assert keys() == keys()
    different = [keys(), keys(rank=1), keys(start=(4, 16)), keys(seed=5)]
    assert len({str(k) for k in different}) == 4
    assert {key for row in different for pair in row for key in pair} == {f"{number:04}" for number in range(12)}


def test_buffer_mixes_shards(make_shards):
    shards = make_shards(*[20] * 4)
    in_order = next(iter(_stream(shards, resampled=True)))["key"]
    assert int(in_order[1]) == int(in_order[0]) + 1
    mixed = islice(_stream(shards, resampled=True, shuffle_buffer=40), 10)
    keys = [int(key) for batch in mixed for key in batch["key"]]
    assert len({key // 20 for key in keys}) > 1
    assert keys != sorted(keys)


def _header(data, number):
    """Offset of a member's header."""
    return [offset for offset in range(0, len(data), 512) if data[offset + 257 :].startswith(b"ustar")][number]


def _replace(data, offset, new):
    return data[:offset] + new + data[offset + len(new) :]


DAMAGES = {
    "cut within a member": (lambda data: data[: _header(data, 4) + 700], 1, "unexpected end of data"),
    "cut between members": (lambda data: data[: _header(data, 5)], 2, "the end of the archive is missing"),
    "damaged header": (lambda data: _replace(data, _header(data, 4) + 148, b"x"), 1, "a header is damaged"),
    "zero block": (
        lambda data: _replace(data, _header(data, 4), bytes(512)),
        1,
        "there is data after the end of the archive",
    ),
    "not a tar": (lambda data: b"<html>not found</html>" * 100, 0, "a header is damaged"),
    "empty": (lambda data: b"", 0, "the end of the archive is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_ends_there_and_is_reported(tmp_path, make_shards, damage):
    """The shards have the same keys, so their members could be merged into one sample."""
    change, usable, reason = DAMAGES[damage]
    first = make_shards(4, folder="a")[0]
    (second,) = make_shards(4, folder="b")
    first.write_bytes(change(first.read_bytes()))
    second.write_bytes(second.read_bytes().replace(b"caption", b"CAPTION"))
    samples, bad = _read_all(_stream([first, second], max_bad_samples=1))
    # A sample comes out when the next one begins.
    assert samples == _numbers(*range(usable)) + [(f"{number:04}", f"CAPTION {number:04}") for number in range(4)]
    assert bad == [(REST, reason)]


def test_repeated_names_in_a_sample(tmp_path, write_tar, encode_image):
    shard = write_tar(tmp_path / "a.tar", {"1.jpg": encode_image(), "1.JPG": encode_image(), "1.txt": b"x"})
    samples, bad = _read_all(_stream([shard], max_bad_samples=1))
    assert samples == []
    assert "duplicate file name" in bad[0][1]


def test_bad_samples_are_skipped_and_reported_once(tmp_path, write_tar, encode_image):
    image = encode_image()
    members = {
        "0.jpg": image,
        "0.txt": b"good",
        "1.jpg": image[:-100],
        "1.txt": b"cut off",
        "2.txt": b"no image",
        "3.jpg": image,
        "4.jpg": image,
        "4.txt": "caf\u00e9".encode("latin-1"),
        "5.jpg": image,
        "5.txt": b"good too",
    }
    shard = write_tar(tmp_path / "a.tar", members)
    samples, bad = _read_all(_stream([shard, shard], max_bad_samples=4))
    assert samples == [("0", "good"), ("5", "good too")] * 2
    assert [key for key, _ in bad] == ["1", "2", "3", "4"]
    assert "cannot be decoded" in bad[0][1]
    assert bad[1][1] == "there is no image (.jpg or .jpeg or .png or .webp)"
    assert bad[2][1] == "there is no caption (.txt or .json)"
    assert "not UTF-8" in bad[3][1]


def test_stops_above_the_limit(make_shards):
    shards = make_shards(*[1] * 6)
    for shard in shards[1:5]:
        shard.write_bytes(b"")
    samples, bad = _read_all(_stream(shards, max_bad_samples=2))
    assert samples == _numbers(0)
    assert len(bad) == 3


def test_an_endless_stream_without_usable_samples_ends(monkeypatch, make_shards):
    monkeypatch.setattr(shard_stream, "_MAX_FAILURES_IN_A_ROW", 20)
    shards = make_shards(1, 1)
    for shard in shards:
        shard.write_bytes(bytes(1024))
    samples, bad = _read_all(_stream(shards, resampled=True, max_bad_samples=10, shuffle_buffer=5))
    assert samples == []
    assert bad == [(REST, "it holds no samples")] * 2


def test_few_good_samples_are_enough_to_go_on(monkeypatch, tmp_path, write_tar, encode_image):
    monkeypatch.setattr(shard_stream, "_MAX_FAILURES_IN_A_ROW", 5)
    members = {"0.txt": b"no image", "1.txt": b"no image", "2.jpg": encode_image(), "2.txt": b"good"}
    stream = _stream([write_tar(tmp_path / "a.tar", members)], resampled=True, max_bad_samples=2)
    assert [batch["key"] for batch in islice(stream, 10)] == [["2", "2"]] * 10


def test_large_members_are_not_read(monkeypatch, tmp_path, write_tar, encode_image):
    monkeypatch.setattr(shard_stream, "MAX_MEMBER_BYTES", 5000)
    members = {"0.jpg": encode_image(), "0.txt": b"x" * 5001, "1.jpg": encode_image(), "1.txt": b"good"}
    samples, bad = _read_all(_stream([write_tar(tmp_path / "a.tar", members)], max_bad_samples=1))
    assert samples == [("1", "good")]
    assert bad == [("0", "the .txt member has more than 5000 bytes")]


def test_compressed_shards(make_shards):
    shard = make_shards(2)[0]
    packed = gzip.compress(shard.read_bytes())
    shard.write_bytes(packed)
    assert _read_all(_stream([shard])) == (_numbers(0, 1), [])
    shard.write_bytes(packed[:-300])
    assert [key for key, _ in _read_all(_stream([shard], max_bad_samples=1))[1]] == [REST]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path, write_tar, encode_image):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    members = {"0.jpg": encode_image(), "0.pth": trap, "0.pyd": trap, "0.txt": b"x"}
    assert _read_all(_stream([write_tar(tmp_path / "a.tar", members)]))[0] == [("0", "x")]
    assert not (tmp_path / "sprung").exists()


def test_unknown_members_are_ignored(tmp_path, write_tar, encode_image):
    members = {
        "README": b"",
        ".hidden": b"",
        "a/b.c/0.JPG": encode_image(),
        "a/b.c/0.meta.json": b"{",
        "a/b.c/0.txt": b"x",
    }
    assert _read_all(_stream([write_tar(tmp_path / "a.tar", members)])) == ([("a/b.c/0", "x")], [])


class Handler(BaseHTTPRequestHandler):
    def __init__(self, files, *args):
        self.files = files
        super().__init__(*args)

    def do_GET(self):
        name = self.path.partition("?")[0]
        data = self.files.get(name)
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write((data or b"")[: 2000 if name == "/short.tar" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """A loopback server for files by path; it truncates ``/short.tar``."""
    servers = []

    def start(files):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, files))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http with curl")
def test_http(make_shards, serve):
    data = make_shards(3)[0].read_bytes()
    host = serve({"/a.tar": data, "/short.tar": data})
    shards = [f"http://user:SECRET@{host}/{name}.tar?signature=SECRET" for name in ("a", "missing", "short")]
    stream = _stream(shards, max_bad_samples=2)
    samples, _ = _read_all(stream)
    assert samples[:3] == _numbers(0, 1, 2)
    reports = [report for batch in stream for report in batch["bad"]]
    assert [report.shard for report in reports] == [f"http://{host}/missing.tar", f"http://{host}/short.tar"]
    assert reports[0].reason == "the program that reads it ended with status 22"
    assert reports[1].reason == "the program that reads it ended with status 18"
    assert "SECRET" not in str(reports)


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http with curl")
def test_silent_server(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_stream, "_SPEED_S", 1)
    monkeypatch.setattr(shard_stream, "_RETRY_S", 1)
    (tmp_path / "a.tar").touch()
    with closing(FaultyServer(tmp_path)) as server:
        for server.fault in ("silent", "slow header"):
            stream = _stream([f"{server.url}/a.tar"], max_bad_samples=2)
            (report,) = [report for batch in stream for report in batch["bad"]]
            assert report.reason == "the program that reads it ended with status 28"


def test_decoder_that_finds_no_member(make_shards):
    class Decoder(ImageDecoder):
        def __call__(self, *args):
            return next(iter(()))

    stream = _stream([str(make_shards(2)[0])], max_bad_samples=2, decoder=Decoder())
    reports = [report for batch in stream for report in batch["bad"]]
    assert [report.reason for report in reports] == ["the decoder found no member that it needs (StopIteration)"] * 2


def test_pipes_are_named_by_number(make_shards):
    shard = make_shards(2)[0]
    stream = _stream([f"pipe:cat {shard}", "pipe:echo SECRET; exit 3"], max_bad_samples=1)
    assert _read_all(stream)[0] == _numbers(0, 1)
    (report,) = [report for batch in stream for report in batch["bad"]]
    assert report.shard == "pipe: (shard 2 of 2)"
    assert report.reason == "the program that reads it ended with status 3"
    assert "SECRET" not in str(report)


def test_a_stalled_program_is_not_waited_for(tmp_path, make_shards):
    (shard,) = make_shards(20)
    sent, late = _header(shard.read_bytes(), 30), tmp_path / "late"
    batches = iter(_stream([f"pipe:head -c {sent} {shard}; sleep 2; touch {late}"]))
    assert next(batches)["key"] == ["0000", "0001"]
    batches.close()
    assert not late.exists()


def test_a_local_file_that_is_missing(tmp_path):
    assert _read_all(_stream([tmp_path / "a.tar"]))[1] == [(REST, "it cannot be opened (No such file or directory)")]


def test_samples_that_are_passed_over_are_named(tmp_path, write_tar, encode_image):
    members = {
        "0.jpg": encode_image(),
        "0.txt": b"0",
        "1.2.jpg": encode_image(),
        "1.2.txt": b"1",
        "0.seg.png": b"",
        "0.json": b"",
    }
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.warns(
        UserWarning, match=r"x.tar: 2 members are passed over, first 1.2.jpg, since a key ends"
    ) as warned:
        assert _read_all(_stream([path])) == ([("0", "0")], [])
    assert len(warned) == 1
