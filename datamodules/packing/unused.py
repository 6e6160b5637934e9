"""Naming of what a kind of input leaves out of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lit_lora.datamodules.packing.image_folder import CAPTIONS
from lit_lora.datamodules.packing.image_formats import image_extension
from lit_lora.datamodules.packing.images_beside import is_beside_another
from lit_lora.datamodules.packing.input import PackInput
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.datamodules.packing.sample_names import key_digest
from lit_lora.datamodules.packing.walk import walk_files
from lit_lora.visible import visible

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource


def name_unused(source: PackSource, found: PackInput) -> PackInput:
    """The same samples, with the files of the folder that are not packed among those that are left out.

    Args:
        source: The folder.
        found: Its samples.
    """
    if source.is_file or not isinstance(found, PackInput):
        return found
    skipped = [*_other_splits(source), *_tables_and_shards(source, found), *_unlisted(source, found)]
    for extension, entry in source.unknown.items():
        if extension not in CAPTIONS or not found.captions_are_beside:
            skipped.append(entry)
    return replace(found, skipped=(*found.skipped, *skipped), notes=(*found.notes, *_notes(source, found)))


def _other_splits(source: PackSource) -> Iterator[BadFile]:
    for folder, count in source.others.folders.items():
        path = visible(source.path / folder)
        yield BadFile(
            f"{folder}/", f"is another split than train; pack it apart: lit-lora shards pack {path} OUT", count
        )
    for file in source.others.files:
        yield BadFile(file, "is another split than train; move each split to a folder of its own, and pack these apart")


def _tables_and_shards(source: PackSource, found: PackInput) -> Iterator[BadFile]:
    """Tables and shards beside samples of another kind."""
    used = set(found.read_files())
    tars = {path.with_suffix("") for path in source.files.get("tar", ())}
    for extension, paths in source.files.items():
        for path in paths:
            is_table_of_shard = extension == "parquet" and path.with_suffix("") in tars  # of img2dataset
            if path not in used and not is_table_of_shard and path.name != "bad.jsonl":
                name = path.relative_to(source.path).as_posix()
                yield BadFile(name, f"is a .{extension} file beside data of another kind; pack it by its name")


def _unlisted(source: PackSource, found: PackInput) -> Iterator[BadFile]:
    """Images that no table lists."""
    if found.captions_are_beside or not source.has_images:
        return
    listed = np.unique(np.fromiter((key_digest(name) for name in found.image_names()), np.uint64))
    for file, siblings in walk_files(source.path, source.out):
        if found.packs_images_beside and is_beside_another(file, siblings):
            continue
        if image_extension(file):
            digest = np.uint64(key_digest(file))
            place = np.searchsorted(listed, digest)
            if place == len(listed) or listed[place] != digest:
                yield BadFile(file, "is listed in no table beside it; add a row with its caption")


def _notes(source: PackSource, found: PackInput) -> Iterator[str]:
    if source.repeats and not source.is_set and found.captions_are_beside:
        first = visible(next(iter(source.repeats)))
        yield (
            f"the numbers that begin the names of {len(source.repeats)} folders, first {first}, are not applied as repeats:"
            " each image is packed once. They are where all images are in folders of such names, and the folder above them is"
            f" packed; or link a folder under further names (ln -s {first} {first}-2)"
        )
