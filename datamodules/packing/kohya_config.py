"""The data sets of a ``dataset.toml``, the config file of kohya's sd-scripts (their ``docs/config_README-en.md``)."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_lora.datamodules.packing.image_folder import CAPTIONS
from lit_lora.datamodules.packing.source_sets import SourceSet, SourceSets, named_apart
from lit_lora.errors import UserError
from lit_lora.visible import visible

_OF_DATASETS = {"batch_size": int, "bucket_reso_steps": int, "enable_bucket": bool, "resolution": (int, list)}
"""Keys of data sets that are followed, and their types. All data sets of a run have the same values."""

_OF_SUBSETS = {
    "alpha_mask": bool,
    "caption_dropout_rate": (int, float),
    "caption_extension": str,
    "caption_prefix": str,
    "caption_separator": str,
    "caption_suffix": str,
    "class_tokens": str,
    "enable_wildcard": bool,
    "flip_aug": bool,
    "image_dir": str,
    "is_reg": bool,
    "keep_tokens": int,
    "num_repeats": int,
    "random_crop": bool,
    "shuffle_caption": bool,
}
"""Keys of subsets that are followed, and their types."""

_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "caption_dropout_every_n_epochs": ((0,), "use caption_dropout_rate"),
    "caption_tag_dropout_rate": ((0,), "use caption_dropout_rate, which drops whole captions"),
    "color_aug": ((False,), "colors are not changed here; remove it"),
    "conditioning_data_dir": ((), "images for ControlNet are not trained here; remove the data set"),
    "custom_attributes": (({},), "remove it"),
    "face_crop_aug_range": (([],), "crop the images before"),
    "keep_tokens_separator": (("",), "use keep_tokens"),
    "metadata_file": ((), "write metadata.jsonl with file_name and text beside the images, and pack their folder"),
    "network_multiplier": ((1,), "remove it"),
    "secondary_separator": (("",), "remove it"),
    "skip_image_resolution": ((), "remove it, and leave small images out by buckets.max_upscaling"),
    "token_warmup_min": ((1,), "remove it"),
    "token_warmup_step": ((0,), "remove it"),
    "validation_split": ((0,), "remove it, and hold images out by --data.init_args.val_samples"),
}
"""Keys that are refused unless they have one of these values, and what to do."""

_WARNED: dict[str, tuple[tuple[object, ...], str]] = {
    "bucket_no_upscale": ((False,), "small images are enlarged; buckets.max_upscaling: 1 leaves them out"),
    "cache_info": ((False,), "the index of the shards takes its place"),
    "max_bucket_reso": ((), "buckets.max_aspect_ratio limits the sides of buckets"),
    "min_bucket_reso": ((), "buckets.max_aspect_ratio limits the sides of buckets"),
    "resize_interpolation": ((), "images are resized bicubically"),
    "validation_seed": ((), "data.init_args.seed takes its place"),
}
"""Keys without effect, of which a note tells unless they have one of these values."""


def read_kohya_config(path: Path) -> SourceSets:
    """The sets of a ``dataset.toml``.

    Args:
        path: Path of the file. Relative folders are looked for from the working folder and then from the file's.

    Raises:
        UserError: If the file cannot be read, or keys are unknown or ask for what is not done here; the message lists them.
    """
    config = _read(path)
    general = config.get("general", {})
    problems: list[str] = [
        f"{key}: is no table of a dataset.toml; general and datasets are"
        for key in config
        if key not in ("general", "datasets")
    ]
    datasets, sets, notes = [], [], dict[str, None]()
    for dataset in _tables(config, "datasets", path):
        of_dataset = {key: value for key, value in {**general, **dataset}.items() if key != "subsets"}
        datasets.append(of_dataset)
        for subset in _tables(dataset, "subsets", path):
            merged = {**of_dataset, **subset}
            problems += [*_problems(merged), *_misplaced(subset)]
            notes |= dict.fromkeys(_notes(merged))
            sets.append(merged)
    problems += _differences(datasets)
    if problems:
        raise UserError(f"{visible(path)} cannot be followed:\n  " + "\n  ".join(dict.fromkeys(problems)))
    return SourceSets(named_apart([_source_set(subset, path) for subset in sets]), _data(datasets[0]), tuple(notes))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {visible(path)}: {error.strerror}; name a dataset.toml") from error
    except ValueError as error:  # also of bytes that are no UTF-8
        raise UserError(f"{visible(path)} is not a TOML file ({error}); repair it") from error


def _tables(parent: Mapping[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    found = parent.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        written = "[[datasets]]" if name == "datasets" else "[[datasets.subsets]]"
        raise UserError(f"{visible(path)} has no {written}; write one for each, as in sd-scripts' config_README-en.md")
    return found


def _problems(options: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the keys of a subset, its data set and ``general`` together."""
    kinds: dict[str, Any] = _OF_DATASETS | _OF_SUBSETS
    for key, value in options.items():
        if key in _REFUSED:
            neutral, remedy = _REFUSED[key]
            if value not in neutral:
                yield f"{key} = {value!r} is not supported: {remedy}"
        elif key in kinds:
            if not isinstance(value, kinds[key]) or (isinstance(value, bool) and kinds[key] is not bool):
                yield f"{key} = {value!r} has the wrong type"
        elif key not in _WARNED:
            yield f"{key} is unknown; remove it, or check how it is written"
    if not options.get("image_dir"):
        yield "a subset has no image_dir; name the folder of its images"
    if isinstance(repeats := options.get("num_repeats", 1), int) and repeats < 1:
        yield f"num_repeats = {repeats} is too small; it must be at least 1"
    extension = options.get("caption_extension", ".caption")
    if isinstance(extension, str) and extension.removeprefix(".") not in CAPTIONS:
        yield f"caption_extension = {extension!r} is not read; rename the files to .txt"
    resolution = options.get("resolution")
    if isinstance(resolution, list) and (
        len(set(resolution)) != 1 or not all(type(edge) is int for edge in resolution)
    ):
        edges = [edge for edge in resolution if isinstance(edge, int)]
        yield f"resolution = {resolution} is no square; write the edge of one with this area, {math.isqrt(math.prod(edges))}"


def _misplaced(subset: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a subset that would have no effect there."""
    for key in subset:
        if key in _OF_DATASETS:
            yield f"{key} is in a subset, and holds for whole data sets: move it to [[datasets]] or [general]"


def _notes(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if key in _WARNED and value not in _WARNED[key][0]:
            yield f"{key} has no effect: {_WARNED[key][1]}"
    if options.get("keep_tokens") and not options.get("shuffle_caption"):
        yield "keep_tokens has no effect without shuffle_caption"
    if options.get("shuffle_caption") and options.get("caption_prefix"):
        yield "caption_prefix stays first when captions are shuffled, and keep_tokens counts the tags after it"
    if options.get("enable_wildcard"):
        yield "enable_wildcard draws alternatives, but not one of several lines; captions can be a list in a .json file"


def _differences(datasets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for key in _OF_DATASETS:
        values = list(dict.fromkeys(str(dataset.get(key)) for dataset in datasets))
        if len(values) > 1:
            yield f"{key} is {' and '.join(values)} in different data sets, and a run has one; keep those of one value"


def _source_set(options: Mapping[str, Any], path: Path) -> SourceSet:
    folder = Path(options["image_dir"]).expanduser()
    if not folder.exists() and not folder.is_absolute():
        folder = path.parent / folder
    separator = options.get("caption_separator", ",")
    captions = {
        "dropout": options.get("caption_dropout_rate", 0),
        "shuffle_tags": options.get("shuffle_caption", False),
        "keep_tags": options.get("keep_tokens", 0) if options.get("shuffle_caption") else 0,
        "separator": ", " if separator == "," else separator,
        # sd-scripts puts a space between them and the caption.
        "prefix": f"{prefix} " if (prefix := options.get("caption_prefix")) else "",
        "suffix": f" {suffix}" if (suffix := options.get("caption_suffix")) else "",
        "wildcards": options.get("enable_wildcard", False),
    }
    decoder = {
        "center_crop": not options.get("random_crop", False),
        "random_flip": options.get("flip_aug", False),
        "mask": "alpha" if options.get("alpha_mask") else None,
        "captions": captions,
    }
    return SourceSet(
        folder.name,
        folder,
        options.get("num_repeats", 1),
        options.get("class_tokens", ""),
        options.get("caption_extension", ".caption").removeprefix("."),
        options.get("is_reg", False),
        decoder,
    )


def _data(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the datamodule."""
    data: dict[str, Any] = {}
    if "batch_size" in options:
        data["batch_size"] = options["batch_size"]
    if (resolution := options.get("resolution")) is not None:
        data["resolution"] = resolution[0] if isinstance(resolution, list) else resolution
    data["buckets"] = {"divisor": options.get("bucket_reso_steps", 64)} if options.get("enable_bucket") else None
    return data
