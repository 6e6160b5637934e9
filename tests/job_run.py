"""Runs of ``lit-lora fit`` in several processes, started, watched and ended as jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.warm_python import WarmPython

REPOSITORY = Path(__file__).parent.parent
LIGHTNING = [sys.executable, "-m", "lit_lora.cli"]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    *("-m", "lit_lora.cli"),
]


def write_job(
    folder: Path, base: Path, shards: Path, *callbacks: dict[str, Any], processes: int = 2, **trainer: Any
) -> Path:
    """The config of a run over the shards, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": "ddp",
            "max_epochs": 1,
            "default_root_dir": str(folder),
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **trainer,
        },
        "model": {
            "family": {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": str(base)}},
            # Dropout draws from each process' generator: resuming must bring that back too.
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.2}},
            "base_dtype": "float32",
        },
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {
                "train_shards": str(shards),
                "batch_size": 2,
                "resolution": 16,
                "chunks": {"leftovers": "pad"},
                "num_workers": 0,
            },
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Job:
    """A command with all processes that come of it, wherever they go; they are known by their environment.

    Where the command is Python, it and up to two Python processes that it starts are forked from one that has imported the
    libraries.

    Args:
        command: Starts the run.
        log: The console.
        environment: Further variables.
    """

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        self._mark = f"JOB_OF_A_TEST={uuid.uuid4().hex}"
        self._log = log
        # A file for each process that is forked: the system tells the environment of the one it was forked from.
        self._forked = Path(tempfile.mkdtemp(dir=log.parent))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "LIT_LORA"))}
        name, mark = self._mark.split("=")
        own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), name: mark}
        variables = {**inherited, **own, **environment}
        self._first: WarmPython | subprocess.Popen[bytes]
        if command[0] == sys.executable:
            self._first = WarmPython(command[1:], variables, log, log, spares=2, started=self._forked)
        else:
            with log.open("wb") as console:
                self._first = subprocess.Popen(
                    command, env=variables, stdout=console, stderr=console, start_new_session=True
                )

    @property
    def pid(self) -> int:
        return self._first.pid

    @property
    def console(self) -> str:
        return self._log.read_text()

    def processes(self) -> dict[int, dict[str, str]]:
        """Those that run, with the environment that they were started with, which is another one for the first."""
        found: dict[int, dict[str, str]] = {} if self._first.poll() is not None else {self.pid: {}}
        for entry in Path("/proc").glob("[0-9]*"):
            forked = self._forked / entry.name
            try:
                variables = (forked if forked.exists() else entry / "environ").read_bytes()
                environment = variables.decode(errors="replace").split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has ended, or is not ours
                continue
            if self._mark in environment and state != "Z":
                found[int(entry.name)] = dict(line.split("=", 1) for line in environment if "=" in line)
        return found

    def pid_of(self, rank: int, variable: str = "LOCAL_RANK") -> int:
        """The process of this rank; the main one has none, and what a process starts in turn has another number."""
        found = (pid for pid, environment in self.processes().items() if environment.get(variable) == str(rank))
        return min(found, default=self.pid)

    def wait(self, timeout: float) -> int:
        """The exit status; a shell's where a signal ended it."""
        status = self._first.wait(timeout)
        return 128 - status if status < 0 else status

    def wait_for(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self._first.poll() is None, f"the job has ended too early:\n{self.console}"
            assert time.monotonic() < deadline, f"it did not happen in {timeout} s:\n{self.console}"
            time.sleep(0.05)

    def ends_within(self, seconds: float) -> bool:
        """Whether none of its processes runs then."""
        deadline = time.monotonic() + seconds
        while (self._first.poll() is None or self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.processes()

    def kill(self) -> None:
        self._first.kill()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._first.wait()


@contextmanager
def job(command: Sequence[str], log: Path, **environment: str) -> Iterator[Job]:
    """A job of which nothing is left after the block."""
    run = Job(command, log, **environment)
    try:
        yield run
    finally:
        run.kill()


def diaries(folder: Path) -> list[list[str]]:
    """What :class:`~tests.job_callbacks.Diary` has written, a list of words for each batch."""
    return [line.split() for path in sorted(folder.glob("*.diary")) for line in path.read_text().splitlines()]
