"""Images that were drawn, and their files, which hold what they were drawn with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lit_lora.files import atomic_file
from lit_lora.prompts import Prompt

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Formats of images by the endings of their files."""

_EXIF, _USER_COMMENT = 0x8769, 0x9286
_MOST_EXIF = 65_000
"""Bytes of EXIF data that a JPEG file can hold."""


@dataclass(frozen=True)
class DrawnImage:
    """An image with what it was drawn with.

    Args:
        image: The image.
        prompt: Prompt with all of its settings.
        scheduler: Class of the scheduler.
        base: Base model.
        adapters: Paths of the adapters and their scales.
        version: Version of this package.
    """

    image: Image.Image
    prompt: Prompt
    scheduler: str
    base: str
    adapters: Sequence[tuple[str, float]]
    version: str

    @property
    def parameters(self) -> str:
        """Prompt, negative prompt and settings, in the form of AUTOMATIC1111's web UI, which many tools read."""
        settings = {
            "Steps": self.prompt.steps,
            "Sampler": self.scheduler,
            "CFG scale": self.prompt.guidance_scale,
            "Seed": self.prompt.seed,
            "Size": f"{self.image.width}x{self.image.height}",
            "Model": self.base,
            "Adapters": ", ".join(f"{path}: {scale:g}" for path, scale in self.adapters),
            "Version": f"lit-lora {self.version}",
        }
        lines = [self.prompt.prompt]
        if self.prompt.negative_prompt:
            lines.append(f"Negative prompt: {self.prompt.negative_prompt}")
        lines.append(
            ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value not in (None, ""))
        )
        return "\n".join(lines)


def write_image(image: Image.Image, path: Path, parameters: str) -> None:
    """Write an image in the format of the file's ending, with a text: ``parameters`` of PNG, EXIF's user comment of the others.

    Args:
        image: The image.
        path: File to write, with an ending of :data:`FORMATS`.
        parameters: The text.
    """
    kind = FORMATS[path.suffix.lower()]
    with atomic_file(path) as part:
        if kind == "PNG":
            info = PngInfo()
            info.add_text("parameters", parameters)
            image.save(part, format=kind, pnginfo=info)
            return
        exif = Image.Exif()
        # The character code of EXIF, and the byte order in which other tools read it.
        comment = b"UNICODE\0" + parameters.encode("utf-16-be", "replace")
        if len(comment) > _MOST_EXIF:
            warnings.warn(f"{path} cannot hold the parameters of so many images; write PNG to keep them", stacklevel=2)
        else:
            exif.get_ifd(_EXIF)[_USER_COMMENT] = comment
        image.save(part, format=kind, quality=95, exif=exif)


def _quoted(value: object) -> str:
    """A value that readers of the settings cannot take for several."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",:\n") else text
