"""How the processes of one run end together."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "LIT_LORA_LAUNCHER"
"""Environment variable with the number of the process from which Lightning's launcher starts the others."""

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let the system kill this process when the one that started it as part of a run ends, in whatever way; Linux only.

    Lightning's launcher and torchrun watch the processes that they start, but nobody watches them: without this the others
    would wait for a killed main process in a collective call, with their GPUs, until it times out. A process that a person or
    SLURM started is left alone, and remembered as the parent of those that Lightning will start from it.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER] = str(os.getpid())
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
    elif LAUNCHER in os.environ:
        parent = int(os.environ[LAUNCHER])
    else:
        return
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)
