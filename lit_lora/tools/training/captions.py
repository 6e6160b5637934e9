"""Where the captions of a folder of images come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_lora.datamodules.packing.caption_template import CaptionTemplate
from lit_lora.datamodules.packing.find_input import find_input
from lit_lora.datamodules.packing.image_folder import ImageFolder
from lit_lora.errors import UserError
from lit_lora.tools.training.choices import Choice
from lit_lora.visible import visible

_KEY = "data.init_args.decoder"

PROMPTS = 4
"""Number of images that are drawn at a time while training."""


class CaptionRule(NamedTuple):
    """How captions are made.

    Args:
        template: Template of the captions for packing; None to read files.
        prefix: Text before each caption in training.
        choice: The choice, for the screen.
        fallback: Caption of images without a caption file, before which the prefix stands; None if there are none.
    """

    template: CaptionTemplate | None
    prefix: str
    choice: Choice
    fallback: str | None = None


def caption_rule(folder: Path, out: Path, captions: str, trigger: str | None) -> CaptionRule:
    """The source of captions for a folder.

    Args:
        folder: Folder of images.
        out: Folder of the run, which is not part of the input.
        captions: ``auto``, ``files``, ``names``, ``folders`` or ``trigger``.
        trigger: Words that stand for what is learned; None for none.

    Raises:
        UserError: If the folder cannot be packed, or there are no such captions.
    """
    if captions in ("names", "folders", "trigger"):
        return _without_files(captions, trigger)
    prefix, shown = _before_each(trigger)
    found = find_input(folder, out)
    missing = [
        file for file in found.bad if isinstance(found, ImageFolder) and file.reason.startswith("has no caption")
    ]
    if missing and not len(found) and captions == "auto":
        return _trigger_alone(trigger, "the images have no captions")
    if missing and captions == "auto" and trigger:
        why = f"{shown}; {len(missing)} of {len(missing) + len(found)} images have no file and get it alone"
        return CaptionRule(None, prefix, Choice("captions", "from files", why, _KEY), fallback="")
    if missing:
        first = visible(missing[0].file)
        raise UserError(
            f"{len(missing)} of {len(missing) + len(found)} images have no caption, first {first}: write a .txt file of the same "
            "name for each; or give --trigger without --captions, and these images get the trigger alone; or give --captions "
            "trigger, names or folders, with which no files of captions are read"
        )
    return CaptionRule(None, prefix, Choice("captions", "from files", shown, _KEY))


def rule_of_folders(captions: str, trigger: str | None) -> CaptionRule:
    """The source of captions for several folders, each with captions of the same kind.

    Args:
        captions: ``auto``, ``files``, ``names``, ``folders`` or ``trigger``.
        trigger: Words that stand for what is learned; None for none.

    Raises:
        UserError: If the captions are to be the trigger, and there is none.
    """
    if captions in ("names", "folders", "trigger"):
        return _without_files(captions, trigger)
    prefix, shown = _before_each(trigger)
    if captions == "auto" and trigger:
        why = f"{shown}; alone where there is no file"
        return CaptionRule(None, prefix, Choice("captions", "from files", why, _KEY), fallback="")
    return CaptionRule(None, prefix, Choice("captions", "from files", shown, _KEY))


def rule_of_sets(captions: str, trigger: str | None) -> CaptionRule:
    """The source of captions for several sets, each of which has its own.

    Args:
        captions: ``auto`` or ``files``.
        trigger: Words that stand for what is learned; None for none.

    Raises:
        UserError: If ``captions`` is anything else.
    """
    if captions not in ("auto", "files"):
        raise UserError(
            f"captions={captions!r} is for one folder, and here are several sets, whose captions are in files or in the names of "
            "their folders and class_tokens; leave --captions out"
        )
    shown = f'each after "{trigger}"' if trigger else "or else the folder's name or class_tokens"
    return CaptionRule(None, f"{trigger}, " if trigger else "", Choice("captions", "from files", shown, _KEY))


def prompts_for(captions: Sequence[str], prefix: str) -> list[str]:
    """Prompts of the images that are drawn while training: captions from the whole of the data, the rarest repeated last.

    Args:
        captions: Captions of the data, without the prefix; of empty ones, the prefix stands alone.
        prefix: Text before each caption.
    """
    different = list(dict.fromkeys(captions))
    spread = [different[len(different) * place // PROMPTS] for place in range(PROMPTS)]
    return [prefix + caption if caption else prefix.removesuffix(", ") for caption in spread]


def _before_each(trigger: str | None) -> tuple[str, str]:
    """The text before each caption, and what is shown of it."""
    return (f"{trigger}, ", f'each after "{trigger}"') if trigger else ("", "no --trigger")


def _without_files(captions: str, trigger: str | None) -> CaptionRule:
    """Captions from the names of images or folders, or the trigger alone."""
    if captions == "trigger":
        return _trigger_alone(trigger, "as given")
    prefix, shown = _before_each(trigger)
    words = "{name}" if captions == "names" else "{folder}"
    return CaptionRule(CaptionTemplate(words), prefix, Choice("captions", f"from {captions}", shown, _KEY))


def _trigger_alone(trigger: str | None, why: str) -> CaptionRule:
    if not trigger:
        raise UserError(
            f"captions are to be the trigger alone ({why}), and there is none: give --trigger, such as 'sks dog', or --captions "
            "names or folders, or write a .txt file of the same name beside each image"
        )
    return CaptionRule(
        CaptionTemplate(trigger, literal=True), "", Choice("captions", "trigger alone", f'"{trigger}": {why}', _KEY)
    )
