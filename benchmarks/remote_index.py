"""Time and bytes until the index of remote shards can be used: ``python benchmarks/remote_index.py``.

A synthetic index (see ``data_scale.py``) lies on a loopback server that knows ranges and ETags. Fresh processes open it like
``prepare_data``: first without a copy on this machine, then with one, then after the server's file has changed. The second table
tells what the bytes of the index are for, and who reads them before the first batch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from data_scale import write_shards
from fresh_processes import result_of_process

READERS = {
    "names, and columns of shards": (
        "the list of shards",
        ("header", "shard_size", "shard_mtime_ns", "sample_start", "member_start", "key_start"),
    ),
    "extensions": ("the check that no sample lacks an image or a caption", ("extensions",)),
    "width, height": ("the plan, with buckets", ("width", "height")),
    "keys": ("the check of a checkpoint against other data", ("key_bytes",)),
    "members, ends of keys": (
        "the first use of each shard",
        ("key_ends", "member_sample", "member_extension", "member_offset", "member_size"),
    ),
}


class Server(ThreadingHTTPServer):
    """Serves one file by GET, with ranges and an ETag from its modification time."""

    def __init__(self, file: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.file = file
        self.sent = 0


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        size = self.server.file.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2] or size - 1)) if match else (0, size - 1)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("ETag", f'"{self.server.file.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.flush()
        with self.server.file.open("rb") as file:
            self.server.sent += self.connection.sendfile(file, first, last - first + 1)

    def log_message(self, *args: Any) -> None:
        pass


def measure(url: str) -> dict[str, float]:
    """Seconds until the table can be used, after the imports."""
    from lit_lora.datamodules.indexing.open_table import open_table

    cpu, wall = time.process_time(), time.perf_counter()
    table = open_table(url, refresh=True)
    return {"samples": len(table), "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def bytes_by_reader(index: Path) -> dict[str, int]:
    """Bytes of an index for each reader."""
    with index.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    del header["__metadata__"]
    sizes = {name: high - low for name, (low, high) in ((n, one["data_offsets"]) for n, one in header.items())}
    sizes["header"] = 8 + length
    return {what: sum(sizes[name] for name in names) for what, (_, names) in READERS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000, help="shards of 1,000 samples")
    parser.add_argument("--folder", help="folder for the shards, kept and used again; defaults to a temporary one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"
        folder = Path(options.folder or temporary) / "shards"
        if not folder.exists():
            write_shards(folder, options.shards)
        index = folder / "shards.index"
        server = Server(index)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"{'':<28}{'MB sent':>10}{'wall s':>9}{'CPU s':>8}")
        for case in ("no copy", "copy of this version", "copy of another version"):
            if case == "copy of another version":
                os.utime(index)
            before = server.sent
            found = result_of_process([__file__, "--measure", f"http://127.0.0.1:{server.server_address[1]}"])
            sent = (server.sent - before) / 1e6
            print(f"{case:<28}{sent:>10.1f}{found['wall']:>9.2f}{found['cpu']:>8.2f}", flush=True)
        server.shutdown()
        sizes = bytes_by_reader(index)
    print(f"\n{found['samples']:,} samples{'':<14}{'MB':>10}{'share':>8}  read by")
    for what, size in sizes.items():
        print(f"{what:<28}{size / 1e6:>10.1f}{size / sum(sizes.values()):>8.1%}  {READERS[what][0]}")


if __name__ == "__main__":
    main()
