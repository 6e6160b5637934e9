"""Opens files of a new token's embeddings, as diffusers, A1111 and sd-scripts write them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.files import check_readable
from lit_lora.formats.tensor_file import TensorFile

DIFFUSERS = "learned_embeds"
"""Start of the name of the files that diffusers' scripts write."""
ENDINGS = (".safetensors", ".bin", ".pt")
"""Endings of files of embeddings."""
_SECOND = f"{DIFFUSERS}_2"
_BOTH = ("clip_l", "clip_g")
_UNNAMED = ("emb_params", "*", *_BOTH)
"""Keys of sd-scripts and A1111 that are no names of tokens."""


def holds_embedding(path: Path) -> bool:
    """Whether a file holds the embeddings of one new token, and not the layers of an adapter.

    Args:
        path: File, which need not exist.

    Raises:
        UserError: If the file is damaged.
    """
    if path.suffix != ".safetensors":
        return path.suffix in ENDINGS and path.is_file() and _pickled(path) is not None
    if not path.is_file():
        return False
    names = set(TensorFile.open(path).tensors)
    # Names of layers hold dots, and a token holds one at most between < and >.
    return names == {*_BOTH} or (len(names) == 1 and all("." not in name or name.startswith("<") for name in names))


def open_embedding(path: Path) -> tuple[str, TensorFile]:
    """The token of a file of embeddings, and its tensors by token, by text encoder (``clip_l``, ``clip_g``) or by an unnamed key.

    The token is the key of the tensor, or else the file's name in lowercase, as A1111 and ComfyUI have it. For SDXL, diffusers'
    script writes a second file beside the first one; both are read.

    Args:
        path: File with one of :data:`ENDINGS`. What is not safetensors is read without running code that it may hold.

    Raises:
        UserError: If the file is damaged, holds something else, or is the second of two.
    """
    if path.name.startswith(_SECOND):
        first = path.name.replace(_SECOND, DIFFUSERS, 1)
        raise UserError(f"{path} is for the second text encoder; name {first} beside it, with which it is read")
    file = _open(path)
    named = [name for name in file.tensors if name not in _UNNAMED]
    token = named[0] if len(named) == 1 else path.stem.lower()
    second = path.with_name(path.name.replace(DIFFUSERS, _SECOND, 1))
    if not path.name.startswith(DIFFUSERS) or not second.is_file():
        return token, file
    other = _open(second)
    if [*file.tensors] != [*other.tensors] or not named:
        told = " and ".join(", ".join(one.tensors) or "nothing" for one in (file, other))
        raise UserError(
            f"{path} and {second.name} should hold the same token for two text encoders, and they hold {told}; remove the file "
            f"that is of another training"
        )
    both = dict(zip(_BOTH, (file.tensors[token], other.tensors[token]), strict=True))
    return token, TensorFile(path, both, file.metadata)


def _open(path: Path) -> TensorFile:
    if path.suffix == ".safetensors":
        return TensorFile.open(path)
    try:
        check_readable(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name the file of an embedding") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; name the file of an embedding") from error
    found = _pickled(path)
    if found is None:
        raise UserError(
            f"{path} is no embedding of a token; other files than safetensors may run code when they are read: convert it to "
            f"safetensors with the program that wrote it"
        )
    return TensorFile(path, found, {})


def _pickled(path: Path) -> dict[str, Tensor] | None:
    """The tensors of an embedding that torch has saved, read without running code of the file; None for other contents."""
    try:
        check_readable(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError):
        return None
    if isinstance(content, dict):
        content = content.get("string_to_param", content)  # A1111 keeps its tensors there, beside names and steps
    if not isinstance(content, dict) or len(content) not in (1, 2):
        return None
    if len(content) == 2 and {*content} != {*_BOTH}:
        return None
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return None
    return {name: value.detach() for name, value in content.items()}
