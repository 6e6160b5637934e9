"""Python programs in processes that are forked from one that has imported the libraries.

Importing them takes a new interpreter about eight seconds of the processor, more than most runs of a tiny model.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

_LIBRARIES = ("lit_lora.lightning_cli", "lit_lora.families", "lit_lora.datamodules.webdataset_datamodule")
"""Imported before the first fork; no module of tests, since some read the environment when they are imported."""


def warm_context() -> ForkServerContext:
    """Starts processes that have imported the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LIBRARIES))
    return context


class WarmPython:
    """``python ARGUMENTS`` in a session of its own, with the methods of :class:`subprocess.Popen` that tests use.

    Args:
        arguments: A script, or ``-m`` and a module, with its arguments.
        environment: All variables of the process.
        output: File for what it prints. Defaults to none.
        errors: File for its errors, which may be the same. Defaults to none.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: Path = Path(os.devnull),
        errors: Path = Path(os.devnull),
    ) -> None:
        for path in (output, errors):
            path.write_bytes(b"")
        options = (list(arguments), dict(environment), str(output), str(errors), os.getcwd())
        self._process = warm_context().Process(target=_run, args=options)
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], environment: dict[str, str], output: str, errors: str, folder: str) -> None:
    os.setsid()
    os.chdir(folder)
    for path, number in ((output, 1), (errors, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    faulthandler.enable()  # where a crash happened
    gc.freeze()  # collecting what the libraries hold takes a second, and copies their memory
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))  # the variable was read when torch was imported
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    multiprocessing.set_start_method("fork", force=True)  # as Python 3.11 has it in a process of a user
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, folder)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
