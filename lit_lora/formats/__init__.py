"""File formats of adapters: one module for each."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from lit_lora.errors import UserError
from lit_lora.files import atomic_file
from lit_lora.formats.base import AdapterFiles, AdapterFormat
from lit_lora.formats.card import CARD, model_card
from lit_lora.formats.comfyui import ComfyUIFormat
from lit_lora.formats.diffusers import DiffusersFormat
from lit_lora.formats.kohya import KohyaFormat
from lit_lora.formats.lycoris import LycorisFormat
from lit_lora.formats.peft import CONFIG, PeftFormat
from lit_lora.formats.tensor_file import TensorFile
from lit_lora.formats.textual_inversion import embedding_file, write_embeddings

FORMATS: tuple[AdapterFormat, ...] = (PeftFormat(), DiffusersFormat(), KohyaFormat(), ComfyUIFormat(), LycorisFormat())
"""All formats."""

DEFAULT_FORMATS = ("peft", "diffusers")
"""Names of the formats in which an adapter is written unless others are named, as far as they can hold it."""

_SAMPLES = "\n## Samples\n\n"
"""Beginning of the last part of a model card."""

__all__ = [
    "DEFAULT_FORMATS",
    "FORMATS",
    "AdapterFiles",
    "AdapterFormat",
    "ComfyUIFormat",
    "DiffusersFormat",
    "KohyaFormat",
    "LycorisFormat",
    "PeftFormat",
    "TensorFile",
    "add_sample",
    "format_named",
    "marker_of",
    "write_adapter",
    "write_card",
    "write_embeddings",
]


def format_named(name: str) -> AdapterFormat:
    """The format of this name.

    Raises:
        UserError: If there is none.
    """
    found = next((one for one in FORMATS if one.name == name), None)
    if found is None:
        raise UserError(f"format {name!r} is not known; choose from {', '.join(one.name for one in FORMATS)}")
    return found


def marker_of(adapter: AdapterFiles) -> str:
    """Name of a file that every folder with an adapter like this one holds.

    Raises:
        UserError: If none of the default formats can hold the adapter.
    """
    if adapter.state:  # PEFT's files hold every adapter of a denoiser
        return CONFIG
    found = next((one for name in DEFAULT_FORMATS if (one := format_named(name)).holds(adapter)), None)
    if found is None and adapter.new_tokens and not adapter.parts:
        return embedding_file(next(iter(adapter.new_tokens)))
    if found is None:
        reasons = "; ".join(f"{name}: {format_named(name).why_not(adapter)}" for name in DEFAULT_FORMATS)
        raise UserError(f"no file can hold the adapter ({reasons}); train an adapter of the denoiser too, or use LoRA")
    return found.file_name


def write_adapter(adapter: AdapterFiles, folder: Path, formats: Sequence[str] = ()) -> None:
    """Write an adapter in the default formats that can hold it, and in the named ones, with its new tokens and a model card.

    Args:
        adapter: Adapter to write.
        folder: Existing folder.
        formats: Names of further formats; defaults to none.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
        UserError: If a named format is not known or cannot hold the adapter.
    """
    for one in map(format_named, dict.fromkeys((*DEFAULT_FORMATS, *formats))):
        if reason := one.why_not(adapter):
            if one.name in formats:
                raise UserError(f"the adapter cannot be written in the format {one.name}: {reason}")
            continue
        one.write(adapter, folder)
    write_embeddings(adapter, folder)
    write_card(adapter, folder)


def write_card(adapter: AdapterFiles, folder: Path) -> None:
    """Write the model card for the adapter's files in a folder, with the PNG files in its subfolder ``samples``.

    Args:
        adapter: The adapter.
        folder: Folder with the adapter's files.

    Raises:
        OSError: If the card cannot be written.
    """
    files = sorted(path.name for path in folder.iterdir())
    samples = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("samples/*.png"))]
    (folder / CARD).write_text(model_card(adapter, files, samples), encoding="utf-8")


def add_sample(folder: Path, image: Path, description: str) -> None:
    """Copy a sample image into an adapter's folder, and show it at the end of the model card, in place of an earlier one.

    Args:
        folder: Folder with the adapter's files, and a model card if this package wrote them.
        image: PNG file.
        description: Text under the image, such as its prompts.

    Raises:
        OSError: If the image cannot be read or the folder cannot be written.
    """
    shown = Path("samples") / image.name
    (folder / shown.parent).mkdir(exist_ok=True)
    with atomic_file(folder / shown) as part:
        shutil.copyfile(image, part)
    if not (folder / CARD).exists():  # another project's save_adapter wrote the folder
        return
    card, _, earlier = (folder / CARD).read_text(encoding="utf-8").partition(_SAMPLES)
    if (before := re.match(r"!\[samples\]\((samples/[^)]+)\)", earlier)) and before[1] != shown.as_posix():
        (folder / before[1]).unlink(missing_ok=True)
    with atomic_file(folder / CARD) as part:
        part.write_text(f"{card}{_SAMPLES}![samples]({shown.as_posix()})\n\n{description}\n", encoding="utf-8")
