"""Prompts to draw, each with settings of its own, from texts or from a file."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image, ImageOps

from lit_lora.errors import UserError, check_least, check_most
from lit_lora.unique_keys import load_json, load_yaml
from lit_lora.visible import visible

PROMPT_FILES = (".txt", ".yaml", ".yml", ".json")
"""Endings of files of prompts."""

_OPTIONS = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale", "height": "height", "width": "width"}
"""Settings of a prompt by their names in files, with their names in :func:`lit_lora.sampling.generate`."""

MOST_SEED = 2**63 - 1
"""Largest seed that a user may give: torch takes 64 bits, and later images have larger ones."""

_OF_OTHER_PROGRAMS = {
    r"<(?:lora|lyco|hypernet):[^<>]*>": "an adapter; give it with --adapter",
    r"(?<!\S)--[a-z]+(?!\S)": "an option; a .yaml file of prompts gives each its own settings",
    r"\{[^{}]*\|[^{}]*\}": "a choice of words; write a prompt for each",
    r"\([^()]+:\s*\d*\.?\d+\s*\)": "words with a weight; leave out the weight",
}
"""What other programs read in a prompt and this one does not, by its pattern, with what to do."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with its own settings; those that are None are the caller's.

    Args:
        prompt: Text to draw.
        negative_prompt: Text to draw away from; an empty one is none, whatever the caller has.
        seed: Seed of the initial noise.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        steps: Number of denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off.
        image: Path of the image to edit, for families that edit images; defaults to none.

    Raises:
        UserError: If there is no text, or a setting is of another type or below its bound.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            texts = name in ("prompt", "negative_prompt")
            kinds = (str,) if texts or name == "image" else (int, float) if name == "guidance_scale" else (int,)
            if (value is not None or name == "prompt") and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise UserError(f"{name}={value!r} of a prompt is no {' or '.join(kind.__name__ for kind in kinds)}")
        if not self.prompt.strip():
            raise UserError("a prompt is empty; write what to draw")
        check_least(0, seed=self.seed, guidance_scale=self.guidance_scale)
        check_most(MOST_SEED, seed=self.seed)
        check_least(1, width=self.width, height=self.height, steps=self.steps)

    def filled(self, **settings: Any) -> Prompt:
        """The prompt with these settings where it has none of its own."""
        own = asdict(self)
        return replace(self, **{name: value for name, value in settings.items() if own[name] is None})

    def __str__(self) -> str:
        """The prompt and what is set beside it, in one line."""
        shown = asdict(self) | {"image": self.image and Path(self.image).name}
        own = {name: value for name, value in shown.items() if name != "prompt" and value not in (None, "")}
        told = ", ".join(f"{name.replace('_', ' ')} {visible(value)}" for name, value in own.items())
        return visible(self.prompt) + (f" ({told})" if told else "")


class PromptGroup(NamedTuple):
    """Prompts that one batch can hold, since they are drawn with the same options.

    Args:
        places: Their places among all prompts.
        options: Options of :func:`lit_lora.sampling.generate`.
    """

    places: list[int]
    options: dict[str, Any]


def read_prompts(prompts: str | Sequence[str]) -> list[Prompt]:
    """Prompts from texts and files.

    A file has an ending of :data:`PROMPT_FILES`. Each line of a ``.txt`` file is a prompt, except empty lines and those that
    begin with ``#``. YAML and JSON files hold a list, each entry a text, or a mapping with the names of the arguments of
    :class:`Prompt`, of which ``prompt`` is required. The path of an ``image`` is relative to the file's folder.

    What other programs read as options, weights, choices or adapters is part of the text here, with a warning.

    Args:
        prompts: A prompt or the path of a file, or several of these.

    Raises:
        UserError: If there are none, a file cannot be read or has another ending, or an entry has unknown or wrong settings.
    """
    given = [prompts] if isinstance(prompts, str | os.PathLike) else prompts
    found = [prompt for one in given for prompt in _of_text(os.fspath(one), is_alone=len(given) == 1)]
    if not found:
        raise UserError("there are no prompts; give at least one")
    for text in dict.fromkeys(text for one in found for text in (one.prompt, one.negative_prompt) if text):
        _warn_of_syntax(text)
    return found


def prompt_groups(prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[PromptGroup]:
    """Divide prompts into groups that are drawn with the same options, in the order of their first prompts.

    Args:
        prompts: Prompts.
        options: Options of :func:`lit_lora.sampling.generate` for prompts without such a setting.
    """
    groups: dict[tuple[Any, ...], PromptGroup] = {}
    for place, prompt in enumerate(prompts):
        settings = asdict(prompt)
        own = {to: settings[name] for name, to in _OPTIONS.items() if settings[name] is not None}
        # Without a negative prompt some pipelines take zeros, which an empty text beside others would not become.
        key = (*own.items(), bool(prompt.negative_prompt), prompt.image is None)
        groups.setdefault(key, PromptGroup([], {**options, **own})).places.append(place)
    return list(groups.values())


def images_to_edit(prompts: Sequence[Prompt]) -> dict[str, list[Image.Image]]:
    """The option ``sources`` of :func:`lit_lora.sampling.generate` for prompts of one group; none if they have no images.

    Raises:
        UserError: If an image cannot be read.
    """
    sources = [_image(prompt.image) for prompt in prompts if prompt.image is not None]
    return {"sources": sources} if sources else {}


def _warn_of_syntax(text: str) -> None:
    for pattern, meaning in _OF_OTHER_PROGRAMS.items():
        if part := re.search(pattern, text):
            warnings.warn(f"{visible(part[0])} in a prompt is drawn as text, not read as {meaning}", stacklevel=3)


def _image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the image {path} of a prompt: {error}; name another") from error


def _of_text(text: str, is_alone: bool) -> list[Prompt]:
    """The prompts of a file if the text is the path of one, and otherwise the text as a prompt.

    A text of several words among others, such as a caption, is a path only if the file exists.
    """
    ending = "" if "\n" in text else Path(text).suffix.lower()
    path = Path(text).expanduser()
    if ending in PROMPT_FILES and (is_alone or len(text.split()) == 1 or os.path.isfile(path)):
        return _from_file(path)
    if ending and os.path.isfile(text):
        raise UserError(
            f"prompts: {visible(text)} is a file, and its ending is none of {', '.join(PROMPT_FILES)}; rename it, or give the "
            "texts themselves"
        )
    if is_alone and os.path.isfile(text):
        warnings.warn(
            f"{visible(text)} is drawn as a prompt, although a file has this name; to draw the lines of the file, give it the "
            "ending .txt",
            stacklevel=3,
        )
    return [Prompt(text)]


def _from_file(path: Path) -> list[Prompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".txt":
            lines = [line.strip() for line in text.split("\n")]  # splitlines() parts at more than line ends
            return [Prompt(line) for line in lines if line and not line.startswith("#")]
        entries = load_json(text) if path.suffix.lower() == ".json" else load_yaml(text)
    except OSError as error:
        raise UserError(f"cannot read the prompts in {path}: {error.strerror}; name a file that exists") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the prompts in {path}: {error}; correct the file") from error
    if not isinstance(entries, list):
        raise UserError(
            f"{path} holds no list of prompts; begin each entry with '- ', or write one prompt a line as .txt"
        )
    return [_entry(path, number, entry) for number, entry in enumerate(entries, 1)]


def _entry(path: Path, number: int, entry: Any) -> Prompt:
    known = [field.name for field in fields(Prompt)]
    where = f"entry {number} of {path}"
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, Mapping) or "prompt" not in entry:
        raise UserError(f"{where} has no prompt; an entry is a text, or a mapping with {', '.join(known)}")
    if unknown := [str(name) for name in entry if name not in known]:
        raise UserError(f"{where} has the unknown setting {visible(unknown[0])}; choose from {', '.join(known)}")
    try:
        prompt = Prompt(**entry)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if prompt.image is None:
        return prompt
    image = path.parent / Path(prompt.image).expanduser()
    if not image.is_file():
        raise UserError(f"{where}: there is no image {image}; give its path relative to the folder of {path.name}")
    return replace(prompt, image=str(image))
