"""Programs killed at truly random moments, and started again until they are done, end as if nothing had happened.

The seed is drawn anew each time and printed. ``LIT_LORA_KILL_SEED`` sets it, ``LIT_LORA_KILLS`` is the number of kills in all:
``LIT_LORA_KILLS=100 pytest -n 0 -s tests/test_random_kills.py``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from torch.distributed import TCPStore

from lit_lora.datamodules import Chunks, ImageDecoder, Staging, WebDatasetDataModule
from lit_lora.datamodules.indexing.data_index import DataIndex
from tests import killed_runs
from tests.datamodules.faulty_server import FaultyServer
from tests.helpers import differences
from tests.warm_python import warm_context

pytestmark = pytest.mark.slow

CASES = 8  # the tests below
KILLS = -(-int(os.environ.get("LIT_LORA_KILLS", 8)) // CASES)  # in each case
SEED = int(os.environ.get("LIT_LORA_KILL_SEED") or int.from_bytes(os.urandom(4), "big"))
CHUNKS, GLOBAL_BATCH = 5, 4
TIMEOUT_S = 300.0

Start = Callable[[Path], list[Any]]
Read = Callable[[Path], Any]


@pytest.fixture(scope="module")
def forkserver() -> Any:
    """Processes that have imported everything already."""
    context = warm_context()
    first = context.Process(target=time.time)  # waits for the imports, so that no program's time holds them
    first.start()
    first.join()
    return context


@pytest.fixture
def disturb(forkserver: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Kill a program at random moments, and compare what it leaves with what it leaves undisturbed."""
    generator = random.Random(f"{SEED} {request.node.name}")

    def start(programs: Sequence[tuple[Any, ...]]) -> list[Any]:
        processes = []
        for number, (program, *arguments) in enumerate(programs):
            output = tmp_path / f"output-{number}.txt"
            processes.append(forkserver.Process(target=killed_runs.run, args=(program, output, *arguments)))
            processes[-1].start()
        return processes

    def finish(processes: list[Any]) -> None:
        for number, process in enumerate(processes):
            process.join(TIMEOUT_S)
            printed = (tmp_path / f"output-{number}.txt").read_text()[-3000:]
            assert process.exitcode == 0, f"LIT_LORA_KILL_SEED={SEED}\n{printed}"

    def kill(processes: list[Any], seconds: float) -> bool:
        """Whether the processes were killed before they had ended."""
        moment = generator.uniform(0, seconds)
        deadline = time.monotonic() + moment
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))  # ends the wait where all have ended before
        with_children = generator.random() < 0.5
        for process in generator.sample(processes, len(processes)):
            try:
                os.killpg(process.pid, signal.SIGKILL) if with_children else os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()  # it leads no group yet, or has ended
        for process in processes:
            process.join()
        killed = any(process.exitcode == -signal.SIGKILL for process in processes)
        print(f"  {moment:.2f} of {seconds:.2f} s: {'killed' if killed else 'had ended'}")
        if not killed:
            finish(processes)
        return killed

    def disturb(programs: Callable[[Path], Sequence[tuple[Any, ...]]], prepare: Read, read: Read) -> None:
        print(f"\nLIT_LORA_KILL_SEED={SEED} {request.node.name}")
        undisturbed = tmp_path / "undisturbed"
        prepare(undisturbed)
        begin = time.monotonic()
        finish(start(programs(undisturbed)))
        seconds = time.monotonic() - begin
        expected = read(undisturbed)
        kills = 0
        for trial in range(1000):
            folder = tmp_path / f"killed-{trial}"
            prepare(folder)
            ended = False
            while not ended and kills < KILLS:
                ended = not kill(start(programs(folder)), seconds)
                kills += not ended
            if not ended:
                finish(start(programs(folder)))
            found = list(differences(read(folder), expected))
            assert not found, "\n".join([f"LIT_LORA_KILL_SEED={SEED}", *found[:20]])
            if kills == KILLS:
                return

    return disturb


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder by its relative path."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else read_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    }


def saved(folder: Path) -> dict[str, Any]:
    """The checkpoints of a run, and the names of what is beside their folder."""
    return contents(folder / "saved") | {"beside": sorted(path.name for path in folder.iterdir())}


def read_file(path: Path) -> Any:
    if path.is_dir():
        return None
    if path.suffix == ".ckpt":
        return read_checkpoint(path)
    if path.suffix not in (".index", ".safetensors"):
        return path.read_bytes()
    with safe_open(path, framework="numpy") as opened:  # not its bytes: safetensors orders metadata by chance
        tensors = {name: opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
    for values in (tensors, metadata):
        for of_times in ("shard_mtime_ns", "crc32"):  # the checksum covers the times
            values.pop(of_times, None)  # type: ignore[attr-defined]
    return tensors, metadata


def read_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True)
    ema = {name: state for name, state in checkpoint["callbacks"].items() if "AdapterEMA" in name}
    assert ema
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "loops", "WebDatasetDataModule")
    return {name: checkpoint[name] for name in names} | {"rng": checkpoint["lit_lora"]["rng"], "ema": ema}


@pytest.mark.parametrize("jobs", [1, 2])
def test_pack(jobs: int, disturb: Any, tmp_path: Path, encode_image: Callable[..., bytes]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        (images / f"{number:02}.png").write_bytes(encode_image(seed=number, format="PNG"))
        (images / f"{number:02}.txt").write_text(f"image {number}")
    disturb(lambda folder: [(killed_runs.pack, folder, images, jobs)], Path.mkdir, contents)


@pytest.mark.parametrize("jobs", [1, 2])
def test_index(jobs: int, disturb: Any, tmp_path: Path, shards_in: Callable[..., list[Path]]) -> None:
    shards_in(tmp_path / "shards", *[3] * 20)
    disturb(
        lambda folder: [(killed_runs.index, folder, jobs)],
        lambda folder: shutil.copytree(tmp_path / "shards", folder),
        lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()},
    )


def test_cache(disturb: Any, tmp_path: Path, sd_folder: Path, shards_in: Callable[..., list[Path]]) -> None:
    shards_in(tmp_path / "shards", *[4] * 8)
    DataIndex.load_or_build(sorted((tmp_path / "shards").iterdir()))
    disturb(lambda folder: [(killed_runs.cache, folder, sd_folder, tmp_path / "shards")], Path.mkdir, contents)


def test_fit(disturb: Any, tmp_path: Path, sd_folder: Path, shards_in: Callable[..., list[Path]]) -> None:
    """Dropout draws from the global generator, and the average of the adapter is saved too."""
    shards_in(tmp_path / "shards", 8, 8)
    checkpoints = {"every_n_train_steps": 2, "save_last": True}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 12,
            "max_epochs": -1,
            "logger": False,
            "num_sanity_val_steps": 0,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "gradient_clip_val": 1.0,
            "callbacks": [{"class_path": "AdapterEMA"}, {"class_path": "AdapterCheckpoint", "init_args": checkpoints}],
        },
        "model": {
            "family": {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": str(sd_folder)}},
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.2}},
            "base_dtype": "float32",
            "caption_dropout": 0.2,
        },
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {
                "train_shards": str(tmp_path / "shards"),
                "val_samples": 3,
                "batch_size": 2,
                "resolution": 16,
                "decoder": {"random_flip": True},
                "num_workers": 0,
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    disturb(lambda folder: [(killed_runs.fit, folder, tmp_path / "config.yaml")], Path.mkdir, saved)


class DiskWatch(threading.Thread):
    """The most bytes that a folder has held, as often as one can look."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.peak = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.005):
            total = 0
            for path in self.folder.glob("lit_lora-slot-*/*"):
                try:
                    total += path.stat().st_size if ".tar" in path.name else 0
                except FileNotFoundError:
                    continue
            self.peak = max(self.peak, total)


@pytest.fixture
def server(make_shards: Any) -> Iterator[FaultyServer]:
    paths = make_shards(*[6] * 10)
    DataIndex.load_or_build(paths)
    server = FaultyServer(paths[0].parent)
    yield server
    server.close()


def _count_lines(folder: Path) -> int:
    file = folder / "shown-0.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


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


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0)])
def test_training_on_staged_chunks(
    world_size: int,
    num_workers: int,
    disturb: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: FaultyServer,
) -> None:
    """Every planned sample is delivered once, and the staged shards never exceed their budget."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data: dict[str, Any] = {
        "train_shards": server.url,
        "batch_size": GLOBAL_BATCH // world_size,
        "resolution": 8,
        "decoder": ImageDecoder(random_flip=True),
        "num_workers": num_workers,
    }
    probe = WebDatasetDataModule(**data, chunks=Chunks(CHUNKS, staging=Staging(str(tmp_path / "probe"))))
    probe.prepare_data()
    probe.setup("fit")
    budget = int(np.sort(probe.train_samples.chunk_bytes)[-2:].sum())
    plan = probe.plan(world_size)
    generator = random.Random(SEED)
    server.fault = lambda path: 500 if path.endswith(".tar") and generator.random() < 0.1 else None
    watches: list[DiskWatch] = []
    lines = [0]
    stores: list[TCPStore] = []

    def prepare(folder: Path) -> None:
        folder.mkdir()
        watches.append(DiskWatch(folder / "stage"))
        watches[-1].start()

    def programs(folder: Path) -> list[tuple[Any, ...]]:
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))  # as torchrun's, for the group
        lines.append(_count_lines(folder))
        own = data | {"chunks": Chunks(CHUNKS, staging=Staging(str(folder / "stage"), budget))}
        return [(killed_runs.train, folder, rank, world_size, stores[-1].port, own) for rank in range(world_size)]

    def read(folder: Path) -> dict[str, Any]:
        watch = watches[-1]
        watch.stopped.set()
        watch.join()
        assert 0 < watch.peak <= budget
        if (
            _count_lines(folder) > lines[-1]
        ):  # else it was killed after its last checkpoint, and nothing was staged since
            assert [path.name for path in folder.glob("stage/*")] == ["lit_lora-slot-0"]
            names = {path.name for path in folder.glob("stage/*/*")}
            copies = {name for name in names if name.endswith(".tar")}
            assert names - copies - {"lock"} <= {f"state-{name[:16]}" for name in copies}
        return {"shown": _shown(folder, world_size)} | contents(folder / "saved")

    disturb(programs, prepare, read)
    shown = _shown(tmp_path / "undisturbed", world_size)
    steps = killed_runs.STEPS
    assert sorted(shown) == list(range(steps))
    cursor, planned = plan.start(), []
    while len(planned) < steps:
        walked = list(plan.walk(cursor))
        planned += [batch.slots.tolist() for batch, _ in walked]
        cursor = walked[-1][1]
    assert [[slot for _, slot in shown[step]] for step in range(steps)] == planned[:steps]
    per_pass = plan.batches_per_pass
    for first in range(0, steps - per_pass + 1, per_pass):
        keys = [key for step in range(first, first + per_pass) for key, _ in shown[step]]
        assert len(keys) == len(set(keys)) == plan.samples_per_round
