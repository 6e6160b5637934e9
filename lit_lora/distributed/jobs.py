"""Applies a function to many arguments in several processes."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from threading import current_thread, main_thread
from typing import Any, TypeVar

from lit_lora.distributed.processes import end_with_parent
from lit_lora.errors import UserError, check_most
from lit_lora.signals import Terminated

Result = TypeVar("Result")

_ENDED = 128 + signal.SIGTERM
"""Exit status of a process that SIGTERM has ended."""

_calls: list[Callable[..., Any]] = []
"""The call that this process of a pool is in."""

_AHEAD = 4
"""Number of submitted calls per process, so that a slow call does not keep the other processes idle."""


def run_jobs(function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]], jobs: int) -> Iterator[Result]:
    """Call a function with each tuple of arguments and yield the results in their order.

    Args:
        function: Function that can be imported by its name.
        arguments: Tuples of arguments, which are read only a few ahead of the results.
        jobs: Number of processes to spawn; 1 runs the calls in this process.

    Raises:
        UserError: If there are more jobs than :func:`check_workers` allows, or a process dies.
    """
    check_workers(jobs=jobs)
    if jobs == 1:
        yield from (function(*each) for each in arguments)
        return
    pending: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        try:
            for each in arguments:
                with interrupts_ignored():
                    pending.append(pool.submit(call_in_worker, function, *each))
                if len(pending) >= _AHEAD * jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {jobs} processes died, perhaps for lack of memory; start again with fewer jobs"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def start_worker() -> None:
    """Set up a process of a pool, whose calls go through :func:`call_in_worker`.

    It ends with its parent, and at SIGTERM, as SLURM and container runtimes send it to all processes, after the files that a call
    is writing were removed.
    """
    end_with_parent()
    signal.signal(signal.SIGTERM, _end_worker)


def call_in_worker(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process of a pool; SIGTERM ends the process where the function is, and not the call alone."""
    _calls.append(function)
    try:
        return function(*arguments)
    except Terminated:
        os._exit(_ENDED)
    finally:
        _calls.clear()


def _end_worker(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the removal
    if _calls:
        raise Terminated
    os._exit(_ENDED)


def check_workers(**values: int) -> None:
    """Refuse numbers of processes or threads that this machine cannot use.

    Raises:
        UserError: If a number is above 64 and above four times the number of processors.
    """
    processors = os.cpu_count() or 1
    check_most(max(64, 4 * processors), f"; this machine has {processors} processors", **values)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Make processes started inside the block ignore Ctrl-C; this process ends them, without a traceback from each."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
