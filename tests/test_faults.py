"""A process of a job that fails ends the job, with the reason on the console and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lit_lora.distributed.processes import LAUNCHER
from tests.job_run import LIGHTNING, TORCHRUN, Job, diaries, job, write_job

SECONDS = 120


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"tests.job_callbacks.{name}", "init_args": arguments}


def both_train(run: Job, folder: Path) -> None:
    """Wait until both processes have begun their third batch: then one may hang, and the other waits for it or is killed."""
    run.wait_for(lambda: all(sum(rank == words[0] for words in diaries(folder)) >= 3 for rank in "01"))


@pytest.fixture
def start(tmp_path: Path, sd_folder: Path, make_shards: Callable[..., list[Path]]) -> Callable[..., Any]:
    make_shards(12, 12)

    def start(
        launcher: list[str], *callbacks: dict[str, Any], arguments: Sequence[str] = (), pause: float = 0.0
    ) -> Any:
        callbacks = (callback("Diary", folder=str(tmp_path), pause=pause), *callbacks)
        config = write_job(tmp_path / "run", sd_folder, tmp_path / "shards", *callbacks)
        return job([*launcher, "fit", "--config", str(config), *arguments], tmp_path / "console")

    return start


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 0),  # started by a person
        ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, 0),
        ({"LOCAL_RANK": "1", LAUNCHER: str(os.getpid())}, 0),
        ({"LOCAL_RANK": "1", LAUNCHER: "1"}, -signal.SIGKILL),  # its parent has ended, so it has another
    ],
)
def test_a_process_without_its_parent_ends(variables: dict[str, str], status: int) -> None:
    program = "from lit_lora.distributed.processes import end_with_parent; end_with_parent()"
    assert subprocess.run([sys.executable, "-c", program], env=os.environ | variables, timeout=300).returncode == status


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_under_lightnings_launcher_while_the_other_hangs(
    start: Callable[..., Any], tmp_path: Path, killed: int
) -> None:
    with start(LIGHTNING, callback("Fault", hangs=1 - killed)) as run:
        both_train(run, tmp_path)
        os.kill(run.pid_of(killed), signal.SIGKILL)
        assert run.ends_within(SECONDS)
        assert run.wait(1) == 128 + signal.SIGKILL
        if killed == 1:  # the shell has to say it of the main process
            assert "terminated with code -9" in run.console


@pytest.mark.slow
def test_raises_under_lightnings_launcher_while_the_other_hangs(start: Callable[..., Any], tmp_path: Path) -> None:
    """The checkpoint on the way out waits for the other process, too."""
    checkpoint = {"class_path": "AdapterCheckpoint", "init_args": {"save_on_exception": True}}
    with start(LIGHTNING, callback("Fault", hangs=0, fails=1), checkpoint) as run:
        both_train(run, tmp_path)
        assert run.ends_within(SECONDS)
        assert run.wait(1) != 0
        assert "process 1 of 2 failed: ValueError: a fault of the test's" in run.console


@pytest.mark.slow
def test_main_process_raises_under_lightnings_launcher(start: Callable[..., Any], tmp_path: Path) -> None:
    with start(LIGHTNING, callback("Fault", hangs=1, fails=0)) as run:
        both_train(run, tmp_path)
        assert run.ends_within(SECONDS)
        assert run.wait(1) == 1
        assert "process 0 of 2 failed: ValueError: a fault of the test's" in run.console


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["worker killed", "agent killed"])
def test_killed_under_torchrun(start: Callable[..., Any], tmp_path: Path, fault: str) -> None:
    with start(TORCHRUN, callback("Fault", hangs=0)) as run:
        both_train(run, tmp_path)
        os.kill(run.pid_of(1) if fault == "worker killed" else run.pid, signal.SIGKILL)
        assert run.ends_within(SECONDS)
        assert run.wait(1) == (1 if fault == "worker killed" else 128 + signal.SIGKILL)
        if fault == "worker killed":
            assert "-9" in run.console


@pytest.mark.slow
def test_one_process_gives_up_under_torchrun(
    start: Callable[..., Any], tmp_path: Path, write_tar: Callable[..., Path], encode_image: Callable[..., bytes]
) -> None:
    """A damaged sample that only one process reads ends the whole job."""
    with start(TORCHRUN) as run:  # it takes seconds until it reads a shard
        samples = [(f"{i:04}", encode_image(seed=i) if i != 18 else b"no image") for i in range(12, 24)]
        members = {f"{key}.{kind}": data for key, image in samples for kind, data in (("jpg", image), ("txt", b"a"))}
        write_tar(tmp_path / "shards" / "shard-000001.tar", members)
        assert run.ends_within(2 * SECONDS)
        assert run.wait(1) == 1
        assert run.console.count("lit-lora: error in process ") == 1
        assert "bad sample" in run.console


@pytest.mark.slow
def test_comes_back_with_fewer_and_with_more_processes(start: Callable[..., Any], tmp_path: Path) -> None:
    """SIGTERM to one process stops both in order; no sample of the pass is repeated or lost."""
    checkpoint = {"class_path": "AdapterCheckpoint", "init_args": {"every_n_train_steps": 100}}
    resumed: list[str] = []
    for processes, signalled in ((2, 1), (1, 0), (2, None)):  # and which of them gets the signal
        before = len(diaries(tmp_path))
        arguments = ["--trainer.devices", str(processes), *resumed]
        with start(LIGHTNING, checkpoint, arguments=arguments, pause=0.4) as run:
            if signalled is not None:
                run.wait_for(lambda before=before: len(diaries(tmp_path)) > before)  # type: ignore[misc]
                os.kill(run.pid_of(signalled), signal.SIGTERM)
            assert run.wait(300) == (0 if signalled is None else 128 + signal.SIGTERM)
            assert run.ends_within(SECONDS)
            assert run.console.count("lit-lora: stopped by SIGTERM at step ") == (signalled is not None)
            assert run.console.count("this run is not what the checkpoint was made with") == bool(resumed)
            assert run.console.count(f", {2 * processes} ({processes} process") == bool(resumed)
        resumed = ["--ckpt_path", "last"]
    keys = [key for _, *keys in diaries(tmp_path) for key in keys]
    assert sorted(keys) == [f"{i:04}" for i in range(24)]
