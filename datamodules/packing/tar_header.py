"""Headers of tar members that are the same for the same data."""

from __future__ import annotations

import tarfile


def tar_header(name: str, size: int) -> tarfile.TarInfo:
    """A header without anything that differs between two runs or machines."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mtime = 0
    info.mode = 0o644
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info
