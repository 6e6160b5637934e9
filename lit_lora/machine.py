"""Names of the machine and of its processes, for files that other processes read, and its free memory."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterator
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


def available_memory(system: Path = Path("/")) -> int:
    """Bytes of memory that this process can get: what the machine has, with what it keeps of files, or its control groups allow.

    Args:
        system: Folder in which ``proc`` and ``sys`` are.
    """
    import psutil  # type: ignore[import-untyped]

    return min([psutil.virtual_memory().available, *_allowed_by_groups(system)])


def _allowed_by_groups(system: Path) -> Iterator[int]:
    """Bytes that each of this process's control groups still allows, as containers and SLURM limit them."""
    for line in _text(system / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, files = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, files = (
                "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        mount = system / "sys" / "fs" / "cgroup" / root
        # Inside a container, the path may be that on the host, but the container's own group is the mount.
        for group in (mount / path.lstrip("/"), *(mount / path.lstrip("/")).parents):
            allowed, used = _text(group / limit).strip(), _text(group / usage).strip()
            if allowed.isdigit() and used.isdigit():
                kept = re.search(rf"^{files} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
                yield max(0, int(allowed) - int(used) + (int(kept[1]) if kept else 0))
            if group == mount:
                break


def _text(path: Path) -> str:
    """Content of a file; empty if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


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
