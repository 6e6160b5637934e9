"""Python programs in processes that are forked from one that has imported the libraries.

Importing them takes a new interpreter about eight seconds of the processor, more than most runs of a tiny model.
"""

from __future__ import annotations

import faulthandler
import inspect
import multiprocessing
import multiprocessing.process
import os
import pickle
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.garbage import collect_seldom
from tests.warm_imports import LIBRARIES

_IMPORTED = ("tests.warm_imports", *LIBRARIES, "tests.warm_configs")
"""Before the first fork; no further module of tests, since some read the environment when they are imported.

The libraries themselves are named too, for tests that are run from another folder, where the server does not find the first.
"""


def warm_context() -> ForkServerContext:
    """Starts processes that have imported the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


class WarmPython:
    """``python ARGUMENTS`` in a session of its own, with the methods of :class:`subprocess.Popen` that tests use.

    Args:
        arguments: A script, or ``-m`` and a module, with its arguments.
        environment: All variables of the process.
        output: File for what it prints. Defaults to none.
        errors: File for its errors, which may be the same. Defaults to none.
        spares: How many of the Python processes that it starts are forked, too. Defaults to none.
        started: Folder where each of those has a file with its variables, as in ``/proc/PID/environ``, by its id. Defaults to
            none.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: Path = Path(os.devnull),
        errors: Path = Path(os.devnull),
        spares: int = 0,
        started: Path | None = None,
    ) -> None:
        for path in (output, errors):
            path.write_bytes(b"")
        options = (list(arguments), dict(environment), str(output), str(errors), os.getcwd(), spares, started)
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


def _run(
    arguments: list[str],
    environment: dict[str, str],
    output: str,
    errors: str,
    folder: str,
    spares: int,
    started: Path | None,
) -> None:
    os.setsid()
    os.chdir(folder)
    for path, number in ((output, 1), (errors, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    if given := _fork_spares(spares, started):
        arguments, environment = given
    faulthandler.enable()  # where a crash happened
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    collect_seldom()  # freezing also keeps the libraries' memory from being copied
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))  # the variable was read when torch was imported
    rank_zero_only.rank = _get_rank() or 0  # so was that of the rank, when Lightning was
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    multiprocessing.set_start_method("fork", force=True)  # as Python 3.11 has it in a process of a user
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0] == "-u":  # of torchrun
        arguments = arguments[1:]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, folder)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _fork_spares(count: int, started: Path | None) -> tuple[list[str], dict[str, str]] | None:
    """Fork children, before there is any thread, in whose place :class:`subprocess.Popen` would start new interpreters.

    A launcher has them as its children, with an exit status and signals of their own, as those that it starts itself.

    Returns:
        In such a child the arguments for Python and the environment, and nothing in this process.
    """
    spares: list[tuple[int, int]] = []
    for _ in range(count):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            for descriptor in (writer, *(other for _, other in spares)):
                os.close(descriptor)
            with open(reader, "rb") as pipe:
                given = pipe.read()
            if not given:  # nobody has started it
                os._exit(0)
            arguments, environment, own_session = pickle.loads(given)
            if own_session:
                os.setsid()
            multiprocessing.process._parent_process = None  # type: ignore[attr-defined]  # the parent is no multiprocessing's
            return arguments, environment
        os.close(reader)
        spares.append((pid, writer))

    start = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    signature = inspect.signature(start)

    def execute(process: Any, *values: Any) -> None:
        asked = signature.bind(process, *values).arguments
        is_piped = any(asked[end] != -1 for end in ("p2cread", "c2pwrite", "errwrite"))
        if not spares or asked["args"][0] != sys.executable or is_piped or asked["cwd"]:
            start(process, *values)
            return
        process.pid, writer = spares.pop()
        process._child_created = True
        environment = dict(asked["env"] or os.environ)
        if started:
            (started / str(process.pid)).write_text("\0".join(f"{name}={value}" for name, value in environment.items()))
        with open(writer, "wb") as pipe:
            pipe.write(pickle.dumps((list(asked["args"][1:]), environment, asked["start_new_session"])))

    subprocess.Popen._execute_child = execute  # type: ignore[attr-defined]
    return None
