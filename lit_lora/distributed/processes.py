"""Ends the processes of a run together."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing import parent_process
from threading import Thread
from typing import Any

LAUNCHER = "LIT_LORA_LAUNCHER"
"""Environment variable with the id of the process from which Lightning's launcher starts the others."""

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """End this process when the process that started it ends, even if it was killed.

    Lightning's launcher, torchrun and process pools watch the processes that they start, but no process watches them: without
    this, the processes of a killed main process would wait in a collective call until it times out, or forever for work. A
    process that a person or SLURM started is not affected; it is recorded as the parent of those that Lightning starts.

    Children of ``multiprocessing`` watch their parent on every platform; others end with theirs on Linux only.
    """
    parent = parent_process()
    if parent is not None:
        Thread(target=_exit_after, args=(parent,), daemon=True).start()
    if "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER] = str(os.getpid())
    elif parent is not None:
        return  # a child of one of the run's processes, which inherited its environment
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())
    elif LAUNCHER in os.environ:
        end_with(int(os.environ[LAUNCHER]))


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, or at once if it has ended already; Linux only.

    The kernel takes the end of the *thread* that started this process for the end of the parent.

    Args:
        parent: Id of the parent process.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)
