"""Packing of several sets of images, and the config by which a run trains on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_lora.datamodules.packing.kohya_config import read_kohya_config
from lit_lora.datamodules.packing.pack import PackSummary, pack_folder
from lit_lora.datamodules.packing.source_sets import SourceSet, SourceSets, find_folders, sets_of
from lit_lora.datamodules.packing.splits import validation_folder
from lit_lora.errors import UserError
from lit_lora.files import atomic_file
from lit_lora.visible import visible

SETS = "sets.yaml"
"""Name of the config beside the folders of the shards."""


class PackedSets(NamedTuple):
    """The result of packing several sets.

    Attributes:
        found: The sets.
        summaries: The result for each of them.
        held_out: The result for the validation images of each set that has a folder of them, by its name.
        config: Path of the config, for ``lit-lora fit`` after that of a base.
        options: What the config says about the data.
    """

    found: SourceSets
    summaries: list[PackSummary]
    held_out: dict[str, PackSummary]
    config: Path
    options: dict[str, Any]


def find_sets(source: str | Path | Sequence[str | Path], out: str | Path) -> SourceSets | None:
    """Several folders; or the sets of a ``dataset.toml`` or of a folder with folders named ``10_name``, as for kohya's scripts.

    None for another folder or file.

    Raises:
        UserError: If the file cannot be followed, a folder says 0 repeats, or several sources are not all folders.
    """
    if not isinstance(source, str | Path):
        return sets_of([Path(one) for one in source], Path(out))
    source = Path(source)
    return read_kohya_config(source) if source.suffix.lower() == ".toml" else find_folders(source, Path(out))


def pack_sets(found: SourceSets, out: str | Path, *, validation: bool = True, **options: Any) -> PackedSets:
    """Pack each set into a folder of its own in ``out``, and write ``sets.yaml``.

    Class images are repeated so that a pass shows as many of them as of other images, as in sd-scripts. Of a set with folders
    ``train`` and ``validation`` (or ``test``), the second is packed into the folder ``validation`` in ``out``.

    Args:
        found: The sets.
        out: Folder for all of them.
        validation: Whether the validation images are packed. Defaults to True.
        **options: Options of :func:`~lit_lora.datamodules.packing.pack.pack_folder`.

    Raises:
        UserError: As :func:`~lit_lora.datamodules.packing.pack.pack_folder` does, or if all images are class images.
    """
    out = Path(out)
    for one in found.sets:
        if not one.folder.is_dir():
            raise UserError(
                f"the folder {visible(one.folder)} does not exist; name the folder with the images of the set"
            )
    if all(one.prior for one in found.sets):
        raise UserError("all sets are class images (is_reg = true); name images of what is to be learned too")
    apart = {one.name: validation_folder(one.folder) if validation and not one.prior else None for one in found.sets}
    summaries, held_out = [], {}
    for one in found.sets:
        of_set: dict[str, Any] = {"caption_extension": one.caption_extension, "is_set": True, **options}
        of_set["fallback"] = one.fallback or options.get("fallback")
        if one.prior:
            of_set["captions"] = None  # a template is for what is to be learned
        summary = pack_folder(one.folder, out / one.name, **of_set, sources=one.sources)
        if (folder := apart[one.name]) is not None:
            held_out[one.name] = pack_folder(
                folder,
                out / "validation" / one.name,
                **of_set,
                sources=None if one.sources is None else one.sources / folder.name,
            )
            others = [file for file in summary.skipped if file.file != f"{folder.name}/"]
            summary = replace(summary, skipped=others)
        summaries.append(summary)
    repeats = repeats_of(found.sets, [summary.samples for summary in summaries])
    sets = [_options_of(one, out / one.name, times) for one, times in zip(found.sets, repeats, strict=True)]
    data: dict[str, Any] = {"train_shards": None, "train_sets": sets}
    if held_out:
        data |= {"val_samples": 0, "val_shards": [str(summary.folder) for summary in held_out.values()]}
    config = {"data": {"init_args": {**data, **found.data}}}
    if any(one.prior for one in found.sets):
        prior = {"class_path": "lit_lora.objectives.PriorPreservation"}
        config["model"] = {"objective": {"init_args": {"prior": prior}}}
    path = out / SETS
    with atomic_file(path) as part:
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
        part.write_text(f"# lit-lora fit --config configs/sdxl.yaml --config {path}\n{text}", encoding="utf-8")
    return PackedSets(found, summaries, held_out, path, config["data"]["init_args"])


def repeats_of(sets: Sequence[SourceSet], counts: Sequence[int]) -> list[float]:
    """Repeats of each set; those of class images make as many of them as there are other images.

    Args:
        sets: The sets.
        counts: Number of images in each of them.
    """
    shown = {True: 0.0, False: 0.0}
    for one, count in zip(sets, counts, strict=True):
        shown[one.prior] += one.repeats * count
    return [one.repeats * shown[False] / shown[True] if one.prior else float(one.repeats) for one in sets]


def set_rows(packed: PackedSets) -> list[list[str]]:
    """The sets as a table: images, repeats, and how many a pass shows."""
    rows = [["set", "images", "repeats", "in a pass", ""]]
    for one, summary, options in zip(packed.found.sets, packed.summaries, packed.options["train_sets"], strict=True):
        shown = round(options["repeats"] * summary.samples)
        apart = packed.held_out.get(one.name)
        kind = "class images" if one.prior else f"+ {apart.samples:,} for validation" if apart else ""
        rows.append([visible(one.name), f"{summary.samples:,}", f"{options['repeats']:.4g}", f"{shown:,}", kind])
    return rows


def _options_of(one: SourceSet, shards: Path, repeats: float) -> Mapping[str, Any]:
    options: dict[str, Any] = {"shards": str(shards), "repeats": int(repeats) if repeats.is_integer() else repeats}
    if one.prior:
        options["prior"] = True
    if one.decoder is not None:
        options["decoder"] = {"class_path": "lit_lora.datamodules.ImageDecoder", "init_args": dict(one.decoder)}
    return options
