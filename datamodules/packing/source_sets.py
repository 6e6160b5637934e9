"""Several sets of images to pack, each with its own repeats and captions, and the folders by which kohya's scripts name them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_lora.datamodules.indexing.hidden_files import is_hidden
from lit_lora.datamodules.packing.image_formats import image_extension
from lit_lora.datamodules.packing.walk import walk_files
from lit_lora.errors import UserError
from lit_lora.visible import visible

_REPEATS = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class SourceSet:
    """One folder of images.

    Attributes:
        name: Name of the set, which is that of its folder of shards.
        folder: Folder of the images.
        repeats: Number of times that a pass shows them; of class images, their share among the class images.
        fallback: Caption of images without a caption file; empty for none.
        caption_extension: Ending of the caption files; None for all that are known.
        prior: Whether the images are class images.
        decoder: Options of their ``ImageDecoder``; None for those of the run.
        sources: Folder of their source images, if they are targets of editing pairs that are not beside them.
    """

    name: str
    folder: Path
    repeats: float
    fallback: str = ""
    caption_extension: str | None = None
    prior: bool = False
    decoder: Mapping[str, Any] | None = None
    sources: Path | None = None


@dataclass(frozen=True)
class SourceSets:
    """Several sets, and what else was found with them.

    Attributes:
        sets: The sets.
        data: Options of the datamodule for all of them.
        notes: Remarks for the user.
    """

    sets: Sequence[SourceSet]
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def find_folders(source: Path, out: Path) -> SourceSets | None:
    """The sets of a folder whose images are all in folders named ``10_name``, as for kohya's scripts; None for other folders.

    The number is that of the repeats, and the name the caption of images that have none.

    Args:
        source: The folder.
        out: Output folder, which is not part of the input.

    Raises:
        UserError: If a number is 0.
    """
    if not source.is_dir():
        return None
    sets = []
    for entry in sorted(source.iterdir()):
        if is_hidden(entry.name) or os.path.realpath(entry) == os.path.realpath(out):
            continue
        if not entry.is_dir():
            if image_extension(entry.name):
                return None
            continue
        if not any(image_extension(file) for file, _ in walk_files(entry, out)):
            continue
        if (found := _numbered(entry)) is None:
            return None
        sets.append(found)
    return SourceSets(sets) if sets else None


def sets_of(folders: Sequence[Path], out: Path) -> SourceSets:
    """A set for each of several folders; one whose name begins with a number, as in ``10_name``, is repeated as often.

    Args:
        folders: The folders; those in which :func:`find_folders` finds sets stand for these.
        out: Output folder, which is not part of the input.

    Raises:
        UserError: If one is no folder, two contain one another, or a number is 0.
    """
    sets: list[SourceSet] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{visible(folder)} is no folder; several sets are folders of images, named one after the other"
            )
        inside = find_folders(folder, out)
        name = folder.resolve().name
        sets += [_numbered(folder) or SourceSet(name, folder, 1)] if inside is None else inside.sets
    for one in sets:
        for other in sets:
            if one is not other and one.folder.resolve() in other.folder.resolve().parents:
                raise UserError(f"{visible(other.folder)} is inside {visible(one.folder)}; name folders side by side")
    return SourceSets(named_apart(sets))


def given_to_each(found: SourceSets, **values: Sequence[Any] | None) -> SourceSets:
    """The sets, each with its own one of several values.

    Args:
        found: The sets.
        **values: Values by the name of the attribute, in the order of the sets; None leaves it as it is.

    Raises:
        UserError: If there is not one for each set.
    """
    sets = list(found.sets)
    for name, given in values.items():
        if given is None:
            continue
        if len(given) != len(sets):
            names = ", ".join(visible(one.name) for one in sets)
            count = f"{len(given)} {'value' if len(given) == 1 else 'values'}"
            many = f"{len(sets)} {'set' if len(sets) == 1 else 'sets'}"
            raise UserError(f"{name} has {count} for {many}; give one for each of {names}")
        sets = [replace(one, **{name: value}) for one, value in zip(sets, given, strict=True)]
    return replace(found, sets=sets)


def with_class_images(found: SourceSets, folder: Path) -> SourceSets:
    """The sets and, as a further one, a folder of class images, whose caption is the folder's name where there is no file.

    Raises:
        UserError: If it is no folder, or the sets have class images already or the folder among them.
    """
    if not folder.is_dir():
        raise UserError(
            f"class_images={visible(folder)} is no folder; name one of images of the class, as of lit-lora prior"
        )
    if any(one.prior for one in found.sets):
        raise UserError(
            f"class_images={visible(folder)}, and the sets have class images of their own; leave one of them out"
        )
    words = (_REPEATS.fullmatch(folder.resolve().name) or ["", "", folder.resolve().name])[2]
    one = SourceSet("class images", folder, 1, fallback=re.sub(r"[\s_-]+", " ", words).strip(), prior=True)
    return replace(found, sets=named_apart([*found.sets, one]))


def named_apart(sets: Sequence[SourceSet]) -> list[SourceSet]:
    """The same sets, whose names differ.

    Raises:
        UserError: If two have the same folder.
    """
    named: dict[str, SourceSet] = {}
    for one in sets:
        same = next((other for other in named.values() if other.folder.resolve() == one.folder.resolve()), None)
        if same is not None:
            raise UserError(f"{visible(one.folder)} is named more than once; name it once, and raise its repeats")
        name, number = one.name or "set", 1
        while name in named:
            number += 1
            name = f"{one.name}-{number}"
        named[name] = replace(one, name=name)
    return list(named.values())


def _numbered(folder: Path) -> SourceSet | None:
    """The set of a folder named ``10_name``; None for other names."""
    name = folder.resolve().name
    found = _REPEATS.fullmatch(name)
    if found is None:
        return None
    if not int(found[1]):
        raise UserError(f"{visible(folder)} has 0 repeats; give its name a number above 0, or move it elsewhere")
    return SourceSet(name, folder, int(found[1]), fallback=found[2].strip())
