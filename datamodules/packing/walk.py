"""Recursive listing of the files below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lit_lora.datamodules.indexing.hidden_files import is_hidden
from lit_lora.datamodules.packing.image_formats import image_extension
from lit_lora.datamodules.packing.splits import split_of_file, split_of_folder
from lit_lora.errors import UserError
from lit_lora.visible import visible

_TABLES = ("tar", "parquet", "arrow", "jsonl", "csv", "tsv")
"""Extensions of files that hold many samples, whose names may begin with their split."""


@dataclass
class OtherSplits:
    """Files that a walk leaves out, since they belong to other splits than the training data beside them.

    Attributes:
        folders: Number of files with samples in each folder of another split.
        files: Files with the samples of another split.
    """

    folders: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def contain(self, name: str) -> bool:
        """Whether a file is in a folder of another split."""
        return any(name.startswith(f"{folder}/") for folder in self.folders)


def walk_files(
    folder: Path, skip: Path | None = None, others: OtherSplits | None = None
) -> Iterator[tuple[str, Set[str]]]:
    """Yield all files below a folder, sorted by path, each with the names of the files beside it.

    Links are followed, except those to a folder that contains the link. Hidden files of operating systems are passed over. If
    one of several folders (or tables and shards) in a folder is named after training data and others after validation or test
    data, the others are left out.

    Args:
        folder: Folder to list.
        skip: Folder to skip. Defaults to None.
        others: Gets what is left out. Defaults to None.

    Yields:
        Path of the file relative to ``folder``, with ``/``; and the names of all files in its folder.

    Raises:
        UserError: If a folder cannot be read, or contains several splits but none for training.
    """
    real = os.path.realpath  # unlike resolve(), it accepts links to themselves
    above = tuple(
        (one.st_dev, one.st_ino) for one in (os.stat(one) for one in Path(real(folder)).parents if one.exists())
    )
    return _walk(folder, "", None if skip is None else Path(real(skip)), others or OtherSplits(), above)


def _walk(
    folder: Path, prefix: str, skip: Path | None, others: OtherSplits, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, Set[str]]]:
    try:
        stat = folder.stat()
        here = (stat.st_dev, stat.st_ino)
        if here in above or folder.resolve() == skip:
            return
        with os.scandir(folder) as entries:
            # With the slash, names are sorted like full paths.
            listed = (entry.name + "/" if _is_folder(entry) else entry.name for entry in entries)
            names = sorted(name for name in listed if not is_hidden(name))
    except OSError as error:
        raise UserError(f"cannot read the folder {visible(folder)}: {error.strerror}; check its permissions") from error
    left_out = _other_splits(folder, prefix, names, skip, others)
    files = {name for name in names if not name.endswith("/")}
    for name in names:
        if name in left_out:
            continue
        if name.endswith("/"):
            yield from _walk(folder / name, prefix + name, skip, others, (*above, here))
        else:
            yield prefix + name, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads nowhere or to itself is a file that cannot be read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _other_splits(folder: Path, prefix: str, names: list[str], skip: Path | None, others: OtherSplits) -> Set[str]:
    """The names in a folder that belong to other splits than the training data beside them."""
    splits = {name: _split(name) for name in names if _split(name)}
    if len(set(splits.values())) < 2:
        return set()
    counts = {name: _count(folder / name, skip) for name in splits}
    splits = {name: split for name, split in splits.items() if counts[name]}
    if len(set(splits.values())) < 2:
        return set()
    if "train" not in splits.values():
        found = ", ".join(visible(folder / name) for name in list(splits)[:5])
        raise UserError(
            f"{visible(folder)} contains several splits, but none named train; pack one of them, or rename: {found}"
        )
    left_out = {name for name, split in splits.items() if split != "train"}
    for name in sorted(left_out):
        if name.endswith("/"):
            others.folders[prefix + name.rstrip("/")] = counts[name]
        else:
            others.files.append(prefix + name)
    return left_out


def _split(name: str) -> str:
    if name.endswith("/"):
        return split_of_folder(name.rstrip("/"))
    return split_of_file(name) if PurePosixPath(name).suffix[1:].lower() in _TABLES else ""


def _count(path: Path, skip: Path | None) -> int:
    """Number of images in a folder, or of tables and shards if there are none; 1 for a file."""
    if not path.is_dir():
        return 1
    images = tables = 0
    for folder, _, files in os.walk(path):
        if skip is None or not Path(folder).resolve().is_relative_to(skip):
            visible_files = [name for name in files if not is_hidden(name)]
            images += sum(bool(image_extension(name)) for name in visible_files)
            tables += sum(PurePosixPath(name).suffix[1:].lower() in _TABLES for name in visible_files)
    return images or tables
