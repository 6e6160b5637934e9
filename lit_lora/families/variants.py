"""Variants of weight files, such as the ``fp16`` of ``model.fp16.safetensors``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lit_lora.errors import UserError

WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?"
    r"(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.(?P<format>safetensors|bin)"
)
"""Names of the weight files of diffusers and transformers, such as ``model-00001-of-00002.fp16.safetensors``."""


def found_variant(names: Iterable[str], where: str) -> str | None:
    """The variant of a part that has weights of no other variant; None for weights without a variant, which come first.

    Args:
        names: Names of the part's files.
        where: What has the part, for the error.

    Raises:
        UserError: If there are several variants to choose from.
    """
    found = {match["variant"] for name in names if (match := WEIGHT_FILE.fullmatch(name))}
    if not found or None in found:
        return None
    if len(found) > 1:
        several = " and ".join(sorted(map(str, found)))
        raise UserError(f"{where} has weights of the variants {several} alone; set variant to one of them")
    return found.pop()
