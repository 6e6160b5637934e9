"""Time and bytes until training on remote shards can begin: ``python benchmarks/remote_index.py``.

A synthetic index (see ``data_scale.py``) lies on a loopback server that knows ranges. Fresh processes set up the datamodule like
a run with staging, with and without buckets: first without a copy of the index on this machine, then with the copy that the first
start left, then after the server's file has changed; and without ranges, where the whole index is copied. Another row tells what
the first use of a shard then reads, from 100 shards all over the data. The last table tells what the bytes of the index are for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from data_scale import CHUNKS, GLOBAL_BATCH, SAMPLES_PER_SHARD, write_shards
from fresh_processes import result_of_process

READERS = {
    "table of shards": "each start: the list of shards, the checks of keys and of complete samples",
    "width, height": "the plan of buckets",
    "rows": "the first use of each shard",
}


class Server(ThreadingHTTPServer):
    """Serves one file by GET, with an ETag from its modification time."""

    daemon_threads = True

    def __init__(self, file: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.file = file
        self.sent = self.requests = 0
        self.ranges = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.server.requests += 1
        size = self.server.file.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        first, last = (int(match[1]), int(match[2] or size - 1)) if match else (0, size - 1)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("ETag", f'"{self.server.file.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.flush()
        with self.server.file.open("rb") as file, suppress(ConnectionError):  # clients hang up when they know the size
            self.server.sent += self.connection.sendfile(file, first, last - first + 1)

    def log_message(self, *args: Any) -> None:
        pass


def measure(url: str, buckets: bool, shards: int) -> dict[str, float]:
    """Seconds of set-up after the imports, or of the first use of some shards after it."""
    from lit_lora.datamodules import AspectRatioBuckets, Chunks, Staging, WebDatasetDataModule

    with tempfile.TemporaryDirectory() as stage:
        data = WebDatasetDataModule(
            url,
            batch_size=GLOBAL_BATCH,
            chunks=Chunks(CHUNKS, leftovers="pad", staging=Staging(stage, "1000 TB")),
            num_workers=0,
            buckets=AspectRatioBuckets() if buckets else None,
        )
        cpu, wall = time.process_time(), time.perf_counter()
        data.prepare_data()
        data.setup("fit")
        if shards:
            table = data.train_samples.table
            cpu, wall = time.process_time(), time.perf_counter()
            for number in range(shards):
                table.spans(int(table.starts[len(table.locations) * number // shards]))
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return {"samples": len(data.train_samples.table)} | seconds


def bytes_by_reader(index: Path) -> dict[str, int]:
    """Bytes of an index for each reader."""
    with index.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    sizes = {
        name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in ("width", "height", "rows")
    }
    table = index.stat().st_size - sum(sizes.values())
    return {"table of shards": table, "width, height": sizes["width"] + sizes["height"], "rows": sizes["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[10_000, 100_000], help="shards of 1,000 samples")
    parser.add_argument("--folder", help="folder for the shards, kept and used again; defaults to a temporary one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--buckets", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--use", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.buckets, options.use)))
        return
    for shards in options.shards:
        with tempfile.TemporaryDirectory() as temporary:
            os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"
            folder = Path(options.folder or temporary) / str(shards)
            if not folder.exists():
                write_shards(folder, shards)
            compare(folder / "shards.index", shards)


def compare(index: Path, shards: int) -> None:
    """Measure all cases with one index."""
    server = Server(index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{f'{shards:,} shards':<40}{'MB sent':>10}{'requests':>10}{'wall s':>9}{'CPU s':>8}")
    cases: list[tuple[str, list[str]]] = [
        ("no copy", []),
        ("copy of an earlier start", []),
        ("no copy, buckets", ["--buckets"]),
        ("copy of an earlier start, buckets", ["--buckets"]),
        ("first use of 100 shards", ["--use", "100"]),
        ("copy of another version", []),
        ("no copy, server without ranges", []),
    ]
    for case, arguments in cases:
        if case == "first use of 100 shards":
            shutil.rmtree(os.environ["XDG_CACHE_HOME"])
            row(server, "", arguments[:0])  # the set-up, which is not counted
        if case.startswith("no copy"):
            shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
        if case == "copy of another version":
            change(index, 1)
        server.ranges = "without ranges" not in case
        row(server, case, arguments)
    server.shutdown()
    change(index, -1)
    sizes = bytes_by_reader(index)
    print(f"\n{shards * SAMPLES_PER_SHARD:,} samples{'':<14}{'MB':>10}{'share':>8}  read by")
    for what, size in sizes.items():
        print(f"{what:<28}{size / 1e6:>10.1f}{size / sum(sizes.values()):>8.1%}  {READERS[what]}")
    print(flush=True)


def row(server: Server, case: str, arguments: list[str]) -> None:
    """Measure one case and print it, if it has a name."""
    sent, requests = server.sent, server.requests
    found = result_of_process([__file__, "--measure", f"http://127.0.0.1:{server.server_address[1]}", *arguments])
    if case:
        sent, requests = server.sent - sent, server.requests - requests
        print(f"{case:<40}{sent / 1e6:>10.1f}{requests:>10}{found['wall']:>9.2f}{found['cpu']:>8.2f}", flush=True)


def change(index: Path, nanoseconds: int) -> None:
    """Replace an index by one in which the times of the shards are other ones."""
    from lit_lora.datamodules.indexing.data_index import DataIndex

    changed = DataIndex.load(index)
    columns = dict(changed._columns)
    columns["shard_mtime_ns"] = columns["shard_mtime_ns"] + nanoseconds
    DataIndex(changed.names, columns).save(index)


if __name__ == "__main__":
    main()
