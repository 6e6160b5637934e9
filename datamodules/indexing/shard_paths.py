"""Paths of the shards that a user names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from lit_lora.datamodules.remote.transfer import redact
from lit_lora.errors import UserError
from lit_lora.files import check_regular

MAX_SHARDS = 1_000_000
"""Maximum number of shards that braces may name."""


def find_shards(specs: str | Iterable[str]) -> list[Path]:
    """The local shards that paths, folders, globs and braces (``shard-{000000..000099}.tar``) name.

    They have the order of ``specs``; the shards of a folder or a glob are sorted.

    Raises:
        UserError: If a shard is missing, nothing matches, or the shards are not local files.
    """
    paths: list[Path] = []
    for spec in map(os.fspath, [specs] if isinstance(specs, str | Path) else specs):
        if spec.startswith("pipe:"):
            raise UserError(
                "pipe: runs shell commands and is refused; only WebDatasetStreamDataModule(allow_pipe=True) accepts it"
            )
        if "://" in spec:
            raise UserError(f"{redact(spec)} is not a local file; name local shards")
        found = [path for pattern in _expand(spec) for path in _match(pattern)]
        if not found:
            raise UserError(f"{spec} matches no shards; name *.tar files or a folder that contains some")
        paths += found
    missing = [path for path in paths if not path.is_file()]
    if missing:
        other = next((path for path in missing if path.exists()), None)
        if other is not None:
            check_regular(other)
        shown = ", ".join(str(path) for path in missing[:3])
        raise UserError(f"{len(missing)} of {len(paths)} shards are missing, first {shown}; check the names")
    return paths


def _expand(spec: str) -> list[str]:
    try:
        if Path(spec).exists():
            return [spec]
    except OSError:  # a long list in braces is not a valid file name
        pass
    return expand_braces(spec)


def expand_braces(spec: str) -> list[str]:
    """The paths or URLs to which braces expand.

    Raises:
        UserError: If the braces are not balanced, or expand to more than ``MAX_SHARDS``.
    """
    # The package braceexpand holds all numbers of a range in memory.
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", spec)
    too_many = any(len(end) > 18 for ends in ranges for end in ends)
    too_many = too_many or any(abs(int(last) - int(first)) >= MAX_SHARDS for first, last in ranges)
    try:
        found = [] if too_many else list(islice(braceexpand(spec), MAX_SHARDS + 1))
        if too_many or len(found) > MAX_SHARDS:
            raise UserError(f"{redact(spec)[:200]} names more than {MAX_SHARDS} shards; name fewer")
        return found
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{redact(spec)} has unbalanced braces; write for example shard-{{000..099}}.tar") from error


def _match(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    found = glob.glob(str(path), recursive=True)
    return sorted(Path(name) for name in found)
