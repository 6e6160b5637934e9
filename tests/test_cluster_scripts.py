"""The scripts for torchrun and SLURM do what they say, up to going on after a fault."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.job_run import REPOSITORY, diaries, job, write_job

EXAMPLES = REPOSITORY / "docs" / "examples"
STEPS = 6  # 24 samples, two processes, two samples in a batch

SRUN = """#!/usr/bin/env bash
# Two tasks of one node; with --kill-on-bad-exit the other is killed when one fails.
[[ $1 == --kill-on-bad-exit=1 ]] || exit 64
shift
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
done
for task in 0 1; do
    wait -n || { status=$?; kill -KILL $(jobs -p); exit $status; }
done
"""

SCONTROL = """#!/usr/bin/env bash
sleep 10 # a busy controller
echo "$@" >> "$ASKED"
"""


@pytest.fixture
def config(tmp_path: Path, sd_folder: Path, make_shards: Callable[..., list[Path]]) -> Path:
    make_shards(12, 12)
    diary = {"class_path": "tests.job_callbacks.Diary", "init_args": {"folder": str(tmp_path), "pause": 0.5}}
    checkpoints = {"every_n_train_steps": 2, "save_last": "link"}
    checkpoint = {"class_path": "AdapterCheckpoint", "init_args": checkpoints}
    return write_job(tmp_path / "run", sd_folder, tmp_path / "shards", diary, checkpoint)


def path_with(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]])


def free_port() -> int:
    """One that SLURM's jobs have: Lightning takes 15000 plus the last four digits of their number."""
    while True:
        port = random.randrange(16000, 25000)
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)):
                return port


def trained(folder: Path) -> dict[str, Any]:
    """What the checkpoint after the last step holds of the adapter, the optimizer and the place in the data."""
    [path] = folder.rglob(f"*step={STEPS}.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "WebDatasetDataModule")}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_script_is_valid_shell(script: str) -> None:
    checks = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for check in checks:
        subprocess.run([*check, str(EXAMPLES / script)], check=True, timeout=300)


@pytest.mark.slow
def test_torchrun_on_two_nodes_one_of_which_fails(config: Path, tmp_path: Path) -> None:
    variables = {"NNODES": "2", "NPROC_PER_NODE": "1", "OUTPUT": str(tmp_path / "out"), "PATH": path_with()}
    command = [str(EXAMPLES / "torchrun.sh"), "--config", str(config)]

    def node(rank: int) -> Any:
        return job(command, tmp_path / f"console-{rank}", NODE_RANK=str(rank), PORT=port, **variables)

    port = str(free_port())
    with node(0) as first, node(1) as second:
        first.wait_for(lambda: any((tmp_path / "out").rglob("last.ckpt")))
        os.kill(second.pid, signal.SIGKILL)
        assert second.ends_within(120)
        assert first.ends_within(120)
        assert first.wait(1) == 1
    before = len(diaries(tmp_path))
    port = str(free_port())
    with node(0) as first, node(1) as second:
        assert first.wait(300) == second.wait(300) == 0, first.console
    assert len(list((tmp_path / "out").rglob(f"*step={STEPS}.ckpt"))) == 1
    assert len(diaries(tmp_path)) - before <= 2 * (STEPS - 2), "it has not gone on from the checkpoint"


@pytest.mark.slow
def test_a_slurm_job_that_is_stopped_equals_one_that_is_not(config: Path, tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    asked = tmp_path / "asked"
    command = [str(EXAMPLES / "slurm.sbatch"), "--config", str(config)]

    def submitted(number: int, output: str) -> Any:
        allocation = {"JOB_ID": number, "NNODES": 1, "NTASKS": 2, "NTASKS_PER_NODE": 2, "NODELIST": "localhost"}
        variables = {f"SLURM_{name}": str(value) for name, value in allocation.items()}
        more = {"PATH": path_with(tmp_path), "ASKED": str(asked), "OUTPUT": str(tmp_path / output)}
        return job(command, tmp_path / "console", **variables, **more)

    with submitted(free_port() - 15000, "whole") as whole:
        assert whole.wait(300) == 0, whole.console
    expected = trained(tmp_path / "whole")
    for diary in tmp_path.glob("*.diary"):
        diary.unlink()

    number = free_port() - 15000
    with submitted(number, "stopped") as stopped:
        stopped.wait_for(lambda: len(diaries(tmp_path)) >= 2)
        for rank in (0, 1):
            os.kill(stopped.pid_of(rank, "SLURM_PROCID"), signal.SIGUSR1)
        assert stopped.wait(300) == 128 + signal.SIGUSR1
        assert f"; job {number} is requeued\n" in stopped.console
    assert asked.read_text() == f"requeue {number}\n"
    with submitted(number, "stopped") as again:
        assert again.wait(300) == 0, again.console
    assert same(trained(tmp_path / "stopped"), expected)
    keys = [key for _, *keys in diaries(tmp_path) for key in keys]
    assert sorted(keys) == [f"{i:04}" for i in range(24)]
