"""The steps of ``lit-lora prior``: draw the images that are not there yet, then pack them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.described import differences
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, remove_unfinished
from lit_lora.folder_lock import only_run_in
from lit_lora.prompts import Prompt, prompt_groups, read_prompts
from lit_lora.tools.drawing import Drawer
from lit_lora.tools.drawn_image import write_image
from lit_lora.tools.prior import PriorOptions
from lit_lora.visible import visible

CLASS = "class"
"""Folder of the images, with which the keys of their samples begin."""

_RECORD = "prior.json"
_ANY = ("device", "batch_size", "out")
"""Options that another run in the same folder may have."""
_PLACE = ("base", "revision", "variant")
"""Options that tell where the base is; its identity tells which one it is."""


def draw_class_images(options: PriorOptions) -> None:
    """Run ``lit-lora prior``.

    Raises:
        UserError: If prompts or base cannot be used, or the folder holds images of another command.
    """
    out = Path(options.out)
    prompts = _prompts(options)
    with only_run_in(out, "prior"):
        drawer = _drawer(options, prompts)
        _claim(out, options, drawer.base_identity())
        images = out / "images" / CLASS
        images.mkdir(parents=True, exist_ok=True)
        remove_unfinished(images, "*")
        missing = [place for place in range(len(prompts)) if not _file(images, place).exists()]
        if missing:
            _draw(drawer, options.batch_size, images, prompts, missing)
        packed = pack_folder(out / "images", out / "shards")
    print(
        f"{packed.samples:,} class images, {len(missing):,} of them drawn now: {images}\n\n"
        f"Next:\nlit-lora train FOLDER --base {shlex.quote(str(options.base))} --trigger WORDS \\\n"
        f"  --class_images {shlex.quote(str(images))}\n\n"
        f"or, in a config of lit-lora fit, with the objective of the base (DDPM or\nFlowMatching):\n"
        f"  data.init_args.train_shards: [YOUR_SHARDS, {out / 'shards'}]\n"
        f"  model.objective.init_args.prior:\n"
        f"    {{class_path: PriorPreservation, init_args: {{class_keys: '{CLASS}/*'}}}}"
    )


def _prompts(options: PriorOptions) -> list[Prompt]:
    """A prompt with its own seed and settings for each image."""
    assert options.prompts is not None
    names = ("negative_prompt", "steps", "guidance_scale", "height", "width")
    common = {name: getattr(options, name) for name in names}
    given = [one.filled(**common) for one in read_prompts(options.prompts)]
    if any(one.seed is not None for one in given):
        raise UserError(
            "prompts of class images have no seed of their own, since each is drawn many times; leave it out"
        )
    return [given[i % len(given)].filled(seed=options.seed + i) for i in range(options.count)]


def _claim(out: Path, options: PriorOptions, identity: Mapping[str, str]) -> None:
    """Record what the folder holds; refuse a folder with images of other options or of another base."""
    wanted = {name: value for name, value in asdict(options).items() if name not in _ANY}
    wanted["identity"] = identity
    assert options.prompts is not None
    wanted["prompts"] = [asdict(one) for one in read_prompts(options.prompts)]
    path = out / _RECORD
    if not path.exists():
        with atomic_file(path) as part:
            part.write_text(json.dumps(wanted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); name another folder") from error
    if "identity" not in found:  # records of earlier versions know the base by its place
        found["identity"] = identity
    elif parts := [f"{part} is {now}, not {before}" for part, before, now in differences(found["identity"], identity)]:
        raise UserError(
            f"{visible(out)} holds images drawn by another base than {options.base} is now ({'; '.join(parts)}); draw with the "
            f"base as it was, or name another folder"
        )
    else:
        wanted |= {name: found.get(name) for name in _PLACE}
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        raise UserError(
            f"{visible(out)} holds images drawn with {changed[0]}={found.get(changed[0])!r}, not {wanted[changed[0]]!r}; give "
            f"the same options, or name another folder"
        )


def _drawer(options: PriorOptions, prompts: Sequence[Prompt]) -> Drawer:
    return Drawer(
        options.base,
        family=options.family,
        dtype=options.dtype,
        device=options.device,
        sizes=sorted({(one.height, one.width) for one in prompts}, key=str),
        base_options={"revision": options.revision, "variant": options.variant},
        scheduler=options.scheduler,
        edits=any(one.image for one in prompts),
    )


def _draw(drawer: Drawer, batch_size: int, folder: Path, prompts: Sequence[Prompt], missing: Sequence[int]) -> None:
    """Draw the images of these places, and write each batch before the next is drawn."""
    drawer.adapt([])
    with tqdm(
        total=len(prompts), initial=len(prompts) - len(missing), desc="drawing", unit="image", disable=None
    ) as bar:
        for places, settings in prompt_groups([prompts[place] for place in missing], {"height": None, "width": None}):
            for start in range(0, len(places), batch_size):
                batch = [missing[place] for place in places[start : start + batch_size]]
                drawn = drawer.draw([prompts[place] for place in batch], **settings)
                for place, image in zip(batch, drawn, strict=True):
                    with atomic_file(_file(folder, place).with_suffix(".txt")) as part:
                        part.write_text(image.prompt.prompt + "\n", encoding="utf-8")
                    # Last: it tells that the sample is complete.
                    write_image(image.image, _file(folder, place), image.parameters)
                bar.update(len(batch))


def _file(folder: Path, place: int) -> Path:
    return folder / f"{place:06d}.png"
