"""Paths of the shards that a user names."""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from lit_lora.datamodules.indexing.hidden_files import is_hidden
from lit_lora.datamodules.indexing.manifest import MANIFEST, missing_shards
from lit_lora.datamodules.indexing.tar_headers import is_compressed_tar
from lit_lora.errors import UserError
from lit_lora.files import check_regular
from lit_lora.redact import redact
from lit_lora.visible import visible

MAX_SHARDS = 1_000_000
"""Maximum number of shards that braces may name."""

_MOST_FOLDERS = 100
"""Most folders beside shards that are looked at for further shards."""


def find_shards(specs: str | Iterable[str]) -> list[Path]:
    """The local shards that paths, folders, globs and braces (``shard-{000000..000099}.tar``) name.

    They have the order of ``specs``; the shards of a folder or a glob are sorted.

    Raises:
        UserError: If a shard is missing, nothing matches, or the shards are not local files.
    """
    paths: list[Path] = []
    missing: list[Path] = []
    for spec in map(os.fspath, [specs] if isinstance(specs, str | Path) else specs):
        if spec.startswith("pipe:"):
            raise UserError(
                "pipe: runs shell commands and is refused; only WebDatasetStreamDataModule(allow_pipe=True) accepts it"
            )
        if "://" in spec:
            raise UserError(f"{redact(spec)} is not a local file; name local shards")
        before = len(paths)
        for pattern in _expand(spec):
            found, no_files = _match(pattern)
            paths += found
            missing += no_files
        if len(paths) == before:
            raise UserError(
                f"{visible(spec)} matches no shards; name *.tar files or {_advice(spec)}{_compressed_in(spec)}"
            )
    if missing:
        other = next((path for path in missing if path.exists()), None)
        if other is not None:
            check_regular(other)
        shown = ", ".join(visible(path) for path in missing[:3])
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


def _match(pattern: str) -> tuple[list[Path], list[Path]]:
    """The paths that a pattern means, and those of them that are no files."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        if compressed := _compressed_in(path):
            warnings.warn(f"{visible(path)}{compressed}", stacklevel=3)
        with os.scandir(path) as entries:
            listed = [entry for entry in entries if not is_hidden(entry.name)]
        tars = sorted((entry for entry in listed if _is_tar(entry.name)), key=lambda entry: entry.name)
        # The listing tells what is a file; asking for each of 100,000 takes longer.
        found, no_files = [path / entry.name for entry in tars], [path / e.name for e in tars if not e.is_file()]
        if lost := missing_shards(path, {entry.name for entry in listed}):
            warnings.warn(
                f"{visible(path)} lacks {len(lost)} of the shards that its {MANIFEST} lists, first {visible(lost[0])}, whose "
                f"samples are not read; copy them too, or remove {MANIFEST} if they are not wanted",
                stacklevel=3,
            )
        if found and (others := _folders_with_shards(path, listed)):
            warnings.warn(
                f"{visible(path)}: shards in its folders are not read, such as those in {visible(others[0].name)}; name these "
                f"folders too, or move them",
                stacklevel=3,
            )
        return found, no_files
    found = [path]
    if glob.has_magic(pattern) and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    return found, [one for one in found if not one.is_file()]


def _is_tar(name: str) -> bool:
    """Whether a name ends in ``.tar``, as ``os.path.splitext`` tells it, which takes longer."""
    return name[-4:].lower() == ".tar" and name.strip(".").lower() != "tar"


def _is_shard(name: str) -> bool:
    return _is_tar(name) and not is_hidden(name)


def _folders_with_shards(folder: Path, listed: Iterable[os.DirEntry[str]]) -> list[Path]:
    """Folders listed in a folder that hold shards, except caches, which are made from the folder's own shards."""
    names = sorted(entry.name for entry in listed if entry.is_dir())
    folders = (folder / name for name in names[:_MOST_FOLDERS])
    return [each for each in folders if _has_own_shards(each)]


def _has_own_shards(folder: Path) -> bool:
    try:
        return any(map(_is_shard, os.listdir(folder))) and not any(folder.glob("cache*.json"))
    except OSError:  # one that may not be read is not meant to be
        return False


def _advice(spec: str) -> str:
    """What to name in place of what matches no shards: a folder in it that has some, if there is one."""
    try:
        with os.scandir(spec) as entries:
            found = _folders_with_shards(Path(spec), [*entries])
    except OSError:  # no folder
        found = []
    return f"a folder in it that contains some, such as {visible(found[0])}" if found else "a folder that contains some"


def _compressed_in(folder: str | Path) -> str:
    """A remark on the compressed tars in a folder, which cannot be indexed; empty if there are none."""
    found = sorted(filter(is_compressed_tar, os.listdir(folder))) if os.path.isdir(folder) else []
    if not found:
        return ""
    first = visible(found[0])
    return (
        f"; {len(found)} compressed tars there cannot be indexed and are left out, first {first}: decompress them"
        f" (`gunzip {first}`), or stream them with WebDatasetStreamDataModule"
    )
