"""Time and memory until a hundred million samples can be read: ``python benchmarks/data_scale.py``.

Synthetic indexes describe 10, 10,000 and 100,000 shards of 1,000 samples (the shards are sparse files of the right size); the
largest takes 8 GB on disk, and twice as much while it is made. For each index a fresh process measures, after its imports, the
time of the datamodule's ``setup`` with the loader, and the time to seek to nine tenths of the pass, as on resume, and to plan
the chunk there up to its first batch. Seeks to other positions of the pass show that the time does not grow with the number of
samples seen. All of it runs in one thread, so CPU seconds of the sum tell more than wall time on a busy machine. Memory is
the process' peak resident memory less its resident memory after the imports; it includes the pages of the mapped index that
were read.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from fresh_processes import result_of_process
from process_memory import peak_resident, resident

SAMPLES_PER_SHARD = 1000
CHUNKS = 10
GLOBAL_BATCH = 256
SHARDS = (10, 10_000, 100_000)
BOUNDS = {10_000: (2.0, 400), 100_000: (4.0, 1500)}
"""Seconds of set-up, seek and plan, and megabytes more than for ten shards, by the number of shards."""


def write_shards(folder: Path, num_shards: int) -> None:
    """Write sparse files as shards, and an index of their synthetic samples."""
    from lit_lora.datamodules.indexing.columns import SampleColumns
    from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
    from lit_lora.datamodules.indexing.scan import EXTENSIONS
    from lit_lora.datamodules.indexing.shard_rows import checksums, join_rows

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    samples = num_shards * SAMPLES_PER_SHARD
    per_shard = np.arange(SAMPLES_PER_SHARD, dtype=np.int64)
    names = [f"shard-{number:06}.tar" for number in range(num_shards)]
    size = 140_000 * SAMPLES_PER_SHARD
    times = []
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(size)
        times.append((folder / name).stat().st_mtime_ns)
    members = np.array([EXTENSIONS.index("jpg"), EXTENSIONS.index("txt")], np.uint8)
    width, height = (generator.integers(300, 2000, samples, dtype=np.int32) for _ in range(2))
    sums = {"keys_crc32": [], "rows_crc32": [], "sizes_crc32": []}  # type: dict[str, list[int]]
    rows_file = folder / "rows"
    with rows_file.open("wb") as file:  # not in memory
        for number in range(num_shards):
            here = slice(number * SAMPLES_PER_SHARD, (number + 1) * SAMPLES_PER_SHARD)
            shard = SampleColumns(
                key_bytes=_keys(per_shard + here.start),
                key_ends=9 * (per_shard + 1),
                width=width[here],
                height=height[here],
                member_sample=np.repeat(per_shard, 2),
                member_extension=np.tile(members, SAMPLES_PER_SHARD),
                member_offset=512 + 2048 * np.arange(2 * SAMPLES_PER_SHARD, dtype=np.int64),
                member_size=np.full(2 * SAMPLES_PER_SHARD, 1000, np.int64),
            )
            words = join_rows(shard)
            file.write(words.tobytes())
            for name, value in checksums(shard, words).items():
                sums[name].append(value)
    starts = np.arange(num_shards + 1, dtype=np.int64)
    columns: dict[str, Any] = {
        "shard_size": np.full(num_shards, size, np.int64),
        "shard_mtime_ns": np.array(times, np.int64),
        "sample_start": starts * SAMPLES_PER_SHARD,
        "member_start": starts * 2 * SAMPLES_PER_SHARD,
        "key_start": starts * 9 * SAMPLES_PER_SHARD,
        "pattern_start": starts,
        "patterns": np.full(num_shards, (1 << members).sum(), np.int64),
        "pattern_counts": np.full(num_shards, SAMPLES_PER_SHARD, np.int64),
        "rows": np.memmap(rows_file, np.int64, "r"),
        "width": width,
        "height": height,
    }
    DataIndex(names, columns | {name: np.array(values, np.int64) for name, values in sums.items()}).save(
        folder / INDEX_NAME
    )
    rows_file.unlink()


def _keys(samples: Any) -> Any:
    """Keys of nine digits, joined."""
    keys = np.empty((len(samples), 9), np.uint8)
    for place in range(9):
        keys[:, place] = 48 + samples // 10 ** (8 - place) % 10
    return keys.reshape(-1)


def measure(folder: str, buckets: bool) -> dict[str, Any]:
    """Measure the seconds and the megabytes of one start."""
    from lit_lora.datamodules import AspectRatioBuckets, Chunks, WebDatasetDataModule

    gc.freeze()  # as the command line does after its imports
    before = resident()
    cpu, start = time.process_time(), time.perf_counter()
    data = WebDatasetDataModule(
        folder,
        batch_size=GLOBAL_BATCH,
        chunks=Chunks(CHUNKS, leftovers="pad"),
        val_samples=64,
        num_workers=0,
        buckets=AspectRatioBuckets() if buckets else None,
    )
    data.setup("fit")
    loader = data.train_dataloader()
    set_up = time.perf_counter() - start
    state = loader.state_dict()
    seeks = {}
    for tenths in (9, 0, 5):
        start = time.perf_counter()
        taken = len(loader) * tenths // 10 + 5
        position = {"chunk_position": tenths, "pass_batches": taken, "visit_batches": 5}
        loader.load_state_dict(state | position | {"segments": [GLOBAL_BATCH, 5]})
        next(loader.plan.walk(loader.cursor))
        seeks[tenths] = time.perf_counter() - start
        if tenths == 9:
            cpu = time.process_time() - cpu
            peak = peak_resident() - before
    return {"samples": len(loader._dataset), "set_up_s": set_up, "seeks_s": seeks, "cpu_s": cpu, "peak_mb": peak / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--buckets", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.buckets)))
        return
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}; {CHUNKS} chunks")
    for shards, (seconds, megabytes) in BOUNDS.items():
        print(f"bounds for {shards:,} shards: {seconds} s for set-up, seek and plan; {megabytes} MB more than for ten")
    print()
    print("     samples  buckets  set-up s  seek and plan at 9/10 s  0/10 s  5/10 s   sum s  CPU s  peak MB  more MB")
    with tempfile.TemporaryDirectory() as folder:
        for num_shards in SHARDS:
            write_shards(Path(folder) / str(num_shards), num_shards)
        for buckets in ([], ["--buckets"]):
            small = 0.0
            for num_shards in SHARDS:
                found = result_of_process([__file__, "--measure", f"{folder}/{num_shards}", *buckets])
                seeks = found["seeks_s"]
                small = small or found["peak_mb"]
                print(
                    f"{found['samples']:12,}  {'yes' if buckets else 'no':>7}  {found['set_up_s']:8.2f}"
                    f"  {seeks['9']:23.2f}  {seeks['0']:6.2f}  {seeks['5']:6.2f}  {found['set_up_s'] + seeks['9']:6.2f}"
                    f"  {found['cpu_s']:5.2f}"
                    f"  {found['peak_mb']:7.0f}  {found['peak_mb'] - small:7.0f}"
                )


if __name__ == "__main__":
    main()
