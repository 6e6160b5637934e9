"""Identity of the parts of a pipeline folder, as a digest of their contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lit_lora.families.variants import WEIGHT_FILE

_BLOCKS = 256
_BLOCK_BYTES = 1 << 16

_SETTINGS = (".json", ".txt", ".model")


def parts_identity(
    source: Path, parts: Mapping[str, Sequence[str]], variant_of: Callable[[str], str | None]
) -> dict[str, str]:
    """A digest of each part that has weights.

    A digest covers the names and contents of configs, tokenizer files and the weight files that would be loaded. It does not
    depend on the path, so a folder keeps it when it is moved or copied. Of a file above 16 MiB it covers the size and 256 evenly
    spaced blocks of 64 KiB: other weights differ everywhere, and reading whole files would delay the start too long.

    Args:
        source: Folder that diffusers' ``save_pretrained`` wrote.
        parts: Subfolders of each part.
        variant_of: Function from a subfolder to the variant of its weight files; None for files without a variant.
    """
    identities = {}
    for part, folders in parts.items():
        files = [file for folder in folders for file in _files(source / folder, variant_of(folder))]
        if any(WEIGHT_FILE.fullmatch(file.name) for file in files):
            digest = hashlib.blake2b(digest_size=16)
            for file in files:
                digest.update(f"{file.relative_to(source).as_posix()}\0".encode())
                digest.update(_digest(file))
            identities[part] = f"blake2b:{digest.hexdigest()}"
    return identities


def _files(folder: Path, variant: str | None) -> list[Path]:
    """Settings and the weight files that are loaded: those of the variant, ``.bin`` only if there is no safetensors file."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    named = [(file, WEIGHT_FILE.fullmatch(file.name)) for file in files]
    weights = [(file, match["format"]) for file, match in named if match and match["variant"] == variant]
    formats = {form for _, form in weights}
    wanted = "safetensors" if "safetensors" in formats else "bin"
    settings = [file for file in files if file.suffix in _SETTINGS and not file.name.endswith(".index.json")]
    return sorted([*settings, *(file for file, form in weights if form == wanted)])


def _digest(path: Path) -> bytes:
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
