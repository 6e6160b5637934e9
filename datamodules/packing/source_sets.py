"""Several sets of images to pack, each with its own repeats and captions, and the folders by which kohya's scripts name them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """

    name: str
    folder: Path
    repeats: int
    fallback: str = ""
    caption_extension: str | None = None
    prior: bool = False
    decoder: Mapping[str, Any] | None = None


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
        named = _REPEATS.fullmatch(entry.name)
        if named is None:
            return None
        if not int(named[1]):
            raise UserError(f"{visible(entry)} has 0 repeats; give its name a number above 0, or move it elsewhere")
        sets.append(SourceSet(entry.name, entry, int(named[1]), fallback=named[2].strip()))
    return SourceSets(sets) if sets else None
