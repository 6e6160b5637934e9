"""Names of the machine and of its processes, for files that other processes read, and its free memory."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path


def host() -> str:
    """Name of this machine, as part of file names."""
    return re.sub(r"[^\w.-]", "_", platform.node())


def process_space() -> str:
    """Eight digits that name the processes' ids: containers on one machine may count theirs apart."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def available_memory() -> int:
    """Bytes of this machine's memory that are free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is running; a zombie is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        # The state follows the name, which may contain spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return True
