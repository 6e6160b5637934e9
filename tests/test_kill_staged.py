"""Runs on staged chunks that are killed at random moments deliver every planned sample once and end with the same adapter."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_lora.datamodules import Chunks, ImageDecoder, Staging, WebDatasetDataModule
from lit_lora.datamodules.indexing.data_index import DataIndex
from tests import staged_run
from tests.datamodules.faulty_server import FaultyServer
from tests.warm_python import warm_context

pytestmark = pytest.mark.slow

CHUNKS, GLOBAL_BATCH, STEPS = 5, 4, 90
KILLS = 5  # in each of four cases
TIMEOUT_S = 120.0


class DiskWatch(threading.Thread):
    """The most bytes that a folder has held, as often as one can look."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.peak = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.002):
            total = 0
            for path in self.folder.glob("lit_lora-slot-*/*"):
                try:
                    total += path.stat().st_size if ".tar" in path.name else 0
                except FileNotFoundError:
                    continue
            self.peak = max(self.peak, total)


def _staged(folder: Path, budget: int | None = None) -> Chunks:
    return Chunks(CHUNKS, staging=Staging(str(folder), budget))


@pytest.fixture(scope="module")
def forkserver() -> Any:
    """Processes that have imported everything already."""
    return warm_context()


@pytest.fixture
def server(make_shards: Any) -> Iterator[FaultyServer]:
    paths = make_shards(*[6] * 10)
    DataIndex.load_or_build(paths)
    server = FaultyServer(paths[0].parent)
    yield server
    server.close()


def _start(context: Any, world_size: int, folder: Path, data: dict[str, Any]) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=staged_run.run, args=(rank, world_size, port, folder, data, STEPS))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _lines(folder: Path) -> int:
    file = folder / "shown-0.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _finish(processes: list[Any], folder: Path) -> None:
    for rank, process in enumerate(processes):
        process.join(TIMEOUT_S)
        assert process.exitcode == 0, (folder / f"output-{rank}.txt").read_text()[-3000:]


def _kill(processes: list[Any], folder: Path, generator: random.Random) -> bool:
    """Wait for a random moment, then kill; False if the run was over by then."""
    enough = _lines(folder) + generator.randint(0, STEPS // 4)
    deadline = time.monotonic() + TIMEOUT_S
    # One in four dies before its first batch: in the start, while the first chunk is staged.
    while _lines(folder) < enough and generator.random() > 0.003:
        alive = [process.is_alive() for process in processes]
        if not all(alive):
            assert (folder / "done-0").exists(), (folder / "output-0.txt").read_text()[-3000:]
            return False
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(generator.random() / 20)
    for process in generator.sample(processes, len(processes)):
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    return True


def _shown(folder: Path, world_size: int) -> dict[int, list[tuple[str, int]]]:
    """What each step was given, over all processes; a step that was done again must have been given the same."""
    steps: dict[int, list[tuple[str, int]]] = {}
    for rank in range(world_size):
        own: dict[int, list[tuple[str, int]]] = {}
        for line in (folder / f"shown-{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            shown = [(key, slot) for key, slot in entry["shown"]]
            assert own.setdefault(entry["step"], shown) == shown
        for step, shown in own.items():
            steps[step] = steps.get(step, []) + shown
    return steps


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return checkpoint["state_dict"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: FaultyServer,
    forkserver: Any,
    world_size: int,
    num_workers: int,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = random.Random(10 * world_size + num_workers)
    data: dict[str, Any] = {
        "train_shards": server.url,
        "batch_size": GLOBAL_BATCH // world_size,
        "resolution": 8,
        "decoder": ImageDecoder(random_flip=True),
        "num_workers": num_workers,
    }
    probe = WebDatasetDataModule(**data, chunks=_staged(tmp_path / "probe"))
    probe.prepare_data()
    probe.setup("fit")
    budget = int(np.sort(probe.train_samples.chunk_bytes)[-2:].sum())
    plan = probe.plan(world_size)

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    data["chunks"] = _staged(tmp_path / "stage-straight", budget)
    _finish(_start(forkserver, world_size, straight, data), straight)

    # The killed run's server fails now and then too.
    server.fault = lambda path: 500 if path.endswith(".tar") and generator.random() < 0.2 else None
    data["chunks"] = _staged(tmp_path / "stage", budget)
    watch = DiskWatch(tmp_path / "stage")
    watch.start()
    kills = 0
    while kills < KILLS:
        processes = _start(forkserver, world_size, killed, data)
        if not _kill(processes, killed, generator):
            break
        kills += 1
    if not (killed / "done-0").exists():
        _finish(_start(forkserver, world_size, killed, data), killed)
    watch.stopped.set()
    watch.join()

    assert kills == KILLS
    assert 0 < watch.peak <= budget
    shown = _shown(killed, world_size)
    assert shown == _shown(straight, world_size)
    assert sorted(shown) == list(range(STEPS))
    cursor, planned = plan.start(), []
    while len(planned) < STEPS:
        walked = list(plan.walk(cursor))
        planned += [batch.slots.tolist() for batch, _ in walked]
        cursor = walked[-1][1]
    assert [[slot for _, slot in shown[step]] for step in range(STEPS)] == planned[:STEPS]
    per_pass = plan.batches_per_pass
    for first in range(0, STEPS - per_pass + 1, per_pass):
        keys = [key for step in range(first, first + per_pass) for key, _ in shown[step]]
        assert len(keys) == len(set(keys)) == plan.samples_per_round
    ours, theirs = _adapter(killed), _adapter(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
