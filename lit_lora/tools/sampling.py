"""The steps of ``lit-lora sample``: read prompts, draw with one choice of adapters after another, write."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from lit_lora.errors import UserError
from lit_lora.files import check_place
from lit_lora.folder_lock import only_run_in
from lit_lora.formats import format_named
from lit_lora.formats.find import adapter_files
from lit_lora.prompts import Prompt, prompt_groups, read_prompts
from lit_lora.report_text import format_next, format_option
from lit_lora.sampling import image_grid
from lit_lora.tools.adapter_input import read_input
from lit_lora.tools.drawing import Drawer, ScaledAdapter
from lit_lora.tools.drawn_image import FORMATS, DrawnImage, write_image
from lit_lora.tools.labelled_grid import labelled_grid
from lit_lora.tools.sample import SampleOptions

_OF_ONE_COMMAND = ("adapter", "prompts", "scales", "combine", "out", "format", "columns")
"""Options that the next command has with other values, or that have no effect there."""


class Column(NamedTuple):
    """Adapters that draw together, and what they are called."""

    name: str
    adapters: list[ScaledAdapter]


def draw_samples(options: SampleOptions) -> None:
    """Run ``lit-lora sample``.

    Raises:
        UserError: If prompts, base, adapters or a size cannot be used, or another run draws into the folder.
    """
    target = _target(options)
    columns = columns_of(options)
    for path in {one.path for column in columns for one in column.adapters}:
        adapter_files(path)  # before anything is drawn
    prompts = _prompts(options)
    if options.guidance_rescale and all((one.guidance_scale or 0) <= 1 for one in prompts):
        raise UserError(
            f"guidance_rescale={options.guidance_rescale:g} has no effect without guidance; set guidance_scale above 1, or leave "
            "it out"
        )
    if target.suffix:
        check_place(target)  # before anything is drawn
    with nullcontext() if target.suffix else only_run_in(target, "sample"):
        own = {"revision": options.revision, "variant": options.variant, "vae": options.vae}
        drawer = Drawer(
            options.base,
            family=options.family,
            dtype=options.dtype,
            device=options.device,
            sizes=sorted({(one.height, one.width) for one in prompts}, key=str),
            base_adapters=options.base_adapters or (),
            base_options={**own, "config": options.base_config},
            scheduler=options.scheduler,
            edits=any(one.image for one in prompts),
        )
        drawn = []
        for number, column in enumerate(columns, 1):
            if len(columns) > 1:
                print(f"drawing {number} of {len(columns)}: {column.name}", flush=True)
            drawer.adapt(column.adapters)
            drawn.append(_draw(drawer, prompts, options.guidance_rescale))
        _write(drawn, [column.name for column in columns], target, options)
    if following := _next(options, columns):
        print(following)


def columns_of(options: SampleOptions) -> list[Column]:
    """The choices of adapters that are compared.

    Raises:
        UserError: If an adapter is given twice, or the number of scales is not that of the combined adapters.
    """
    paths, scales = [_adapter_of(path) for path in options.adapters], options.factors
    # A comparison may show a link beside what it leads to, such as the last checkpoint's adapter.
    places = list(map(os.path.realpath if options.combine else os.path.abspath, paths))
    if twice := [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise UserError(
            f"the adapter {twice[-1]} is given more than once; give it once, with --scales for several scales"
        )
    names = _names(paths)
    if not options.combine:
        told = len(scales) > 1 or scales != [1.0]
        found = [
            Column(f"{name}, scale {scale:g}" if told else name, [ScaledAdapter(path, scale)])
            for path, name in zip(paths, names, strict=True)
            for scale in scales
            if scale != 0
        ]
        base = [] if paths and 0 not in scales else [Column("base", [ScaledAdapter(path, 0) for path in paths[:1]])]
        return base + found
    if len(paths) < 2:
        raise UserError(
            f"--combine needs several adapters, and there is {len(paths)}; give --adapter ONE TWO, or leave it out"
        )
    scales = scales * len(paths) if options.scales is None else scales
    if len(scales) != len(paths):
        raise UserError(f"--combine needs one scale for each adapter: {len(paths)} are given, and {len(scales)} scales")
    name = " + ".join(f"{scale:g} {name}" for scale, name in zip(scales, names, strict=True))
    return [Column(name, [ScaledAdapter(*one) for one in zip(paths, scales, strict=True)])]


def _adapter_of(path: str) -> str:
    """The folder of the adapter beside a checkpoint of this program; other paths as they are."""
    beside = Path(path).with_suffix(".adapter")
    return str(beside) if path.endswith(".ckpt") and beside.is_dir() else path


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart, without the endings of files."""
    parts = [Path(path.removesuffix(".safetensors").removesuffix(".adapter")).parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(paths):
            return names
    return list(paths)


def _prompts(options: SampleOptions) -> list[Prompt]:
    """All images of a column, each as a prompt with all of its settings."""
    common = {
        name: getattr(options, name) for name in ("negative_prompt", "steps", "guidance_scale", "height", "width")
    }
    assert options.prompts is not None
    read = [one.filled(**common) for one in read_prompts(options.prompts) for _ in range(options.count)]
    return [
        one.filled(seed=options.seed + i) if one.seed is None else replace(one, seed=one.seed + i % options.count)
        for i, one in enumerate(read)
    ]


def _draw(drawer: Drawer, prompts: Sequence[Prompt], guidance_rescale: float) -> list[DrawnImage]:
    """One image for each prompt."""
    drawn: dict[int, DrawnImage] = {}
    common = {"height": None, "width": None, "guidance_rescale": guidance_rescale}
    for places, settings in prompt_groups(prompts, common):
        drawn |= dict(zip(places, drawer.draw([prompts[place] for place in places], **settings), strict=True))
    return [drawn[place] for place in range(len(prompts))]


def _target(options: SampleOptions) -> Path:
    out = options.out
    target = Path(out)
    if target.suffix and target.suffix.lower() not in FORMATS:
        raise UserError(
            f"out={out!r} has an ending that is not known; use {', '.join(FORMATS)} for one file, or none for a folder"
        )
    if target.suffix and options.format != "png" and FORMATS[target.suffix.lower()] != FORMATS[f".{options.format}"]:
        raise UserError(
            f"format={options.format!r} is for the files in a folder, and out={out!r} is one {FORMATS[target.suffix.lower()]} "
            f"file; change its ending, or leave format out"
        )
    if target.is_dir() if target.suffix else target.is_file():
        raise UserError(f"out={out!r} exists and is {'a folder' if target.suffix else 'a file'}; name another")
    return target


def _write(drawn: Sequence[Sequence[DrawnImage]], names: Sequence[str], target: Path, options: SampleOptions) -> None:
    """Write the images of all columns as one grid, or one by one into a folder if the target has no file ending."""
    images = [image for column in drawn for image in column]
    replaced = int(target.is_file())
    if not target.suffix:
        for number, column in enumerate(drawn):
            name = re.sub(r"[^\w.=-]+", "_", names[number])
            of_column = f"-{number:02d}-{name}" if len(drawn) > 1 else ""
            for i, image in enumerate(column):
                path = target / f"{i:04d}{of_column}.{options.format}"
                replaced += path.exists()
                write_image(image.image, path, image.parameters)
    elif len(images) == 1:
        write_image(images[0].image, target, images[0].parameters)
    else:
        parameters = "\n\n".join(image.parameters for image in images)
        write_image(_grid(drawn, names, options.columns), target, parameters)
    others = 0 if target.suffix else sum(path.suffix in FORMATS for path in target.iterdir()) - len(images)
    told = f", in place of {replaced} of {'that name' if replaced == 1 else 'these names'}" if replaced else ""
    told += f", beside {others} that were there" if others > 0 else ""
    print(f"{len(images)} {'image' if len(images) == 1 else 'images'}: {target}{told}")


def _next(options: SampleOptions, columns: Sequence[Column]) -> str:
    """The next command for an adapter: comparing its scales, and then its file for other programs; empty if there is none."""
    if len(options.adapters) != 1:
        return ""
    path = _adapter_of(options.adapters[0])
    if len(columns) == 1:
        prompts = [options.prompts] if isinstance(options.prompts, str) else options.prompts or []
        words = ["lit-lora sample --scales 0 0.5 1 --out scales.png"]
        if prompts:
            words.append(
                format_option("prompts", prompts[0]) if len(prompts) == 1 else f"--prompts {shlex.join(prompts)}"
            )
        return format_next(*words, *_given(options), f"--adapter {shlex.quote(path)}")
    if not Path(path).is_dir() or format_named("kohya").why_not(read_input(path, options.family)):
        return ""
    family = [f"--family {shlex.quote(options.family)}"] if options.family else []
    output = shlex.quote(f"{Path(path).stem}.safetensors")
    return format_next("lit-lora adapter convert --format kohya", *family, shlex.quote(path), output)


def _given(options: SampleOptions) -> list[str]:
    """The options that were given and hold for the next command too, such as seed and size."""
    return [
        format_option(field.name, value if isinstance(value, str) else json.dumps(value))
        for field in fields(options)
        if (value := getattr(options, field.name)) != field.default and field.name not in _OF_ONE_COMMAND
    ]


def _grid(drawn: Sequence[Sequence[DrawnImage]], names: Sequence[str], columns: int) -> Image.Image:
    """A picture of all images: of several columns with their names and the prompts of the rows."""
    if len(drawn) == 1:
        return to_pil_image(image_grid([one.image for one in drawn[0]], columns))
    rows = [[one.image for one in row] for row in zip(*drawn, strict=True)]
    return labelled_grid(rows, names, [f"{one.prompt.prompt} (seed {one.prompt.seed})" for one in drawn[0]])
