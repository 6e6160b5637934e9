"""Runs of a Python script in a fresh process, or in several that train together as under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

_SHOWN = 5000  # characters of a process' errors that an error message shows


class ProcessError(RuntimeError):
    """Processes failed.

    Args:
        message: What failed, with the errors of all processes.
        crashed: Whether a signal ended one of them, as it does when a library's native code crashes.
    """

    def __init__(self, message: str, crashed: bool) -> None:
        super().__init__(message)
        self.crashed = crashed


def result_of_process(arguments: Sequence[str]) -> Any:
    """Run Python in a fresh process and decode the JSON that it prints in its last line.

    Args:
        arguments: The script and its arguments.

    Raises:
        RuntimeError: If the process fails.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed; its errors:\n{done.stderr[-_SHOWN:]}")
    return json.loads(done.stdout.splitlines()[-1])


def results_of_processes(
    arguments: Sequence[str], count: int, timeout: float, environment: Mapping[str, str] | None = None
) -> list[Any]:
    """Run Python with the same arguments in several processes and decode the JSON that each prints in its last line.

    Args:
        arguments: The script and its arguments.
        count: Number of processes; one process gets no process group.
        timeout: Seconds after which all processes are killed.
        environment: Further environment variables.

    Raises:
        RuntimeError: If a process fails, or all of them together take longer than ``timeout``.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = run_processes(arguments, count, Path(folder), timeout, environment)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


class Started(Protocol):
    """A running process."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


def start_fresh(arguments: Sequence[str], environment: Mapping[str, str], output: Path, errors: Path) -> Started:
    """Start Python in a session of its own, so that the processes that it starts can be killed with it."""
    with output.open("wb") as out, errors.open("wb") as err:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)


def run_processes(
    arguments: Sequence[str],
    count: int,
    folder: Path,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    start: Callable[[Sequence[str], Mapping[str, str], Path, Path], Started] = start_fresh,
) -> list[str]:
    """Run Python with the same arguments in several processes, which get the environment variables that torchrun sets.

    If one process fails, the others are killed.

    Args:
        arguments: The script and its arguments.
        count: Number of processes; one process gets no process group.
        folder: Folder for the files with the processes' output and errors.
        timeout: Seconds after which all processes are killed.
        environment: Further environment variables.
        start: Starts a process that leads a session of its own.

    Returns:
        The standard output of each process.

    Raises:
        ProcessError: If a process fails.
        RuntimeError: If all processes together take longer than ``timeout``.
    """
    outputs, errors = ([folder / f"process-{rank}.{kind}" for rank in range(count)] for kind in ("out", "err"))
    store = _meeting_point() if count > 1 else None  # until the processes have ended
    variables = _torchrun_variables(count, store.port if store else 0)
    started: list[Started] = []
    end = time.monotonic() + timeout
    try:
        for rank in range(count):
            own = {**os.environ, **variables[rank], **(environment or {})}
            started.append(start(arguments, own, outputs[rank], errors[rank]))
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            if time.monotonic() > end:
                raise RuntimeError(f"{' '.join(arguments)} took longer than {timeout:g} s; {_last_lines(errors)}")
            time.sleep(0.1)
        failed = {rank: status for rank, process in enumerate(started) if (status := process.poll())}
        if failed:
            how = ", ".join(f"{rank} ({_ending(status)})" for rank, status in failed.items())
            raise ProcessError(
                f"{' '.join(arguments)} failed in process {how}; {_last_lines(errors)}", min(failed.values()) < 0
            )
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [output.read_text() for output in outputs]


def _meeting_point() -> Any:
    """A store in this process where others meet, as in torchrun: no other process can take its port before they begin."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _torchrun_variables(count: int, port: int) -> list[dict[str, str]]:
    """Environment variables of each process, with a process group on this machine for more than one."""
    if count == 1:
        return [{"OMP_NUM_THREADS": "1"}]
    shared = {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "fresh-processes",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _ending(status: int) -> str:
    return f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"


def _last_lines(errors: Sequence[Path]) -> str:
    """The end of what each process wrote to its standard error."""
    written = {
        rank: path.read_text()[-_SHOWN:] for rank, path in enumerate(errors) if path.exists()
    }  # of those that began
    return "\n".join(f"errors of process {rank}:\n{text}" for rank, text in written.items())
