"""Identity of a part of a pipeline on this machine, as a digest of its contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from lit_lora.families.variants import WEIGHT_FILE

_BLOCKS = 256
_BLOCK_BYTES = 1 << 16

_SETTINGS = (".json", ".jinja", ".txt", ".model", ".spm", ".codes", ".tiktoken")
"""Endings of configs, of the vocabularies and merges that tokenizers read, and of chat templates."""

_TEMPLATES = "additional_chat_templates"
"""Folder beside a tokenizer's files with further chat templates."""


def folders_identity(folders: Mapping[str, tuple[Path, str | None]], without_weights: bool = False) -> str | None:
    """A digest of a part in local folders; None if it has no weights.

    It covers the names and contents of configs, tokenizer files, chat templates and the weight files that would be loaded. It
    does not depend on the path, so a folder keeps it when it is moved or copied. Of a file above 16 MiB it covers the size and
    256 evenly spaced blocks of 64 KiB: other weights differ everywhere, and reading whole files would delay the start too long.

    Args:
        folders: The part's folders by their names in the pipeline, each with the variant of its weight files; None for files
            without a variant.
        without_weights: Whether the weights may be elsewhere; defaults to False.
    """
    digest, weights = hashlib.blake2b(digest_size=16), False
    for name, (folder, variant) in folders.items():
        for file in _files(folder, variant):
            weights |= WEIGHT_FILE.fullmatch(file.name) is not None
            digest.update(f"{name}/{file.relative_to(folder).as_posix()}\0".encode())
            digest.update(file_digest(file))
    return f"blake2b:{digest.hexdigest()}" if weights or without_weights else None


def _files(folder: Path, variant: str | None) -> list[Path]:
    """Settings and the weight files that are loaded: those of the variant, ``.bin`` only if there is no safetensors file."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    named = [(file, WEIGHT_FILE.fullmatch(file.name)) for file in files]
    weights = [(file, match["format"]) for file, match in named if match and match["variant"] == variant]
    formats = {form for _, form in weights}
    wanted = "safetensors" if "safetensors" in formats else "bin"
    settings = [file for file in files if file.suffix in _SETTINGS and not file.name.endswith(".index.json")]
    templates = (folder / _TEMPLATES).glob("*.jinja")
    return sorted([*settings, *templates, *(file for file, form in weights if form == wanted)])


def file_digest(path: Path) -> bytes:
    """Digest of a file's contents, of one above 16 MiB of its size and 256 blocks; see :func:`folders_identity`."""
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        if size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
        else:
            for number in range(_BLOCKS):
                start = number * (size - _BLOCK_BYTES) // (_BLOCKS - 1)
                digest.update(os.pread(file.fileno(), _BLOCK_BYTES, start))
    return digest.digest()
