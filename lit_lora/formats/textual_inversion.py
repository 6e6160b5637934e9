"""Files of new tokens' embeddings, one for each token."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.families.new_tokens import check_placeholders, file_stem
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.own_metadata import differing_own, file_metadata, foreign_metadata, own_entry, written_family
from lit_lora.formats.tensor_file import TensorFile, write_tensors

TEXTUAL_INVERSION = "textual inversion"
"""Name of the method of an adapter that has new tokens alone."""
FOLDER = "embeddings"
"""Folder of these files in the folder of an adapter."""


def embedding_file(placeholder: str) -> str:
    """Path of a new token's file in the folder of an adapter."""
    return f"{FOLDER}/{file_stem(placeholder)}.safetensors"


def write_embeddings(adapter: AdapterFiles, folder: Path) -> None:
    """Write the new tokens of an adapter, if it has some.

    With one text encoder the token is the key, as ``load_textual_inversion`` of diffusers reads it. With two, the keys are the
    encoders' names ``clip_l`` and ``clip_g``, as diffusers' guide, A1111 and ComfyUI have them.

    Args:
        adapter: Adapter to write.
        folder: Existing folder of the adapter.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    if not adapter.new_tokens:
        return
    assert adapter.family is not None, "only families have new tokens"
    check_placeholders(adapter.new_tokens)
    (folder / FOLDER).mkdir(exist_ok=True)
    for placeholder, rows in adapter.new_tokens.items():
        tensors = {adapter.family.token_encoders[name] or placeholder: value for name, value in rows.items()}
        own = {"token": placeholder, "base": str(adapter.main_config.get("base_model_name_or_path") or "")}
        write_tensors(folder / embedding_file(placeholder), tensors, file_metadata(adapter, more=own))


def read_embeddings(folder: Path, family: type[ModelFamily] | None = None) -> AdapterFiles:
    """Read the new tokens in an adapter's folder, as an adapter with nothing else.

    Files that do not tell their token, as those of other programs, are passed over with a warning.

    Args:
        folder: Folder of an adapter.
        family: Model family of the base; defaults to the one that the files tell.

    Raises:
        UserError: If a file is damaged, or belongs to another family or to one that is not imported; if two files are of one
            token, or of trainings on different bases.
    """
    tokens: dict[str, Mapping[str, Tensor]] = {}
    files: dict[str, Path] = {}
    found = AdapterFiles({}, {}, family=family)
    for path in embedding_files(folder):
        file = TensorFile.open(path)
        entry = own_entry(file)
        token = entry.get("token")
        if not isinstance(token, str):
            warnings.warn(
                f"{path} does not tell its token and is left out; load it by load_textual_inversion of diffusers",
                stacklevel=2,
            )
            continue
        if token in tokens:
            raise UserError(f"{files[token]} and {path} both hold the new token {token}; remove one of them")
        told = _family_of(entry, path, found.family)
        tokens[token], files[token] = _rows(file, token, told), path
        base = {"base_model_name_or_path": entry["base"]} if entry.get("base") else {}
        metadata = foreign_metadata(file)
        if len(tokens) > 1 and (different := differing_own(metadata, found.metadata)):
            raise UserError(
                f"{path} and the files beside it are of different trainings: their metadata differ in {different[0]}; keep the "
                f"new tokens of each training in a folder of their own"
            )
        found = AdapterFiles({}, {**base, **found.config}, found.metadata or metadata, told)
    check_placeholders(tokens)
    return replace(found, new_tokens=tokens)


def embedding_files(folder: Path) -> list[Path]:
    """The files of embeddings in the folder of an adapter."""
    return sorted((folder / FOLDER).glob("*.safetensors"))


def _family_of(entry: Mapping[str, Any], path: Path, family: type[ModelFamily] | None) -> type[ModelFamily]:
    """The family of a new token, which must go with the family of the base if that is known."""
    told = written_family(entry)
    if told is None:
        raise UserError(
            f"{path} is a new token of the model family {entry.get('family')}, which is not imported; import its module, or name "
            f"it with --family package.module.{entry.get('family')}"
        )
    if family is not None and not (issubclass(family, told) or issubclass(told, family)):
        raise UserError(f"{path} is a new token of {told.__name__}, not of {family.__name__}; name its own base")
    return told


def _rows(file: TensorFile, token: str, family: type[ModelFamily]) -> dict[str, Tensor]:
    """The embeddings of a token, ``(n, D)``, by text encoder."""
    names = {key or token: name for name, key in family.token_encoders.items()}
    if names.keys() != file.tensors.keys():
        raise UserError(
            f"{file.path} should hold {' and '.join(names)} for {family.__name__}, and it holds "
            f"{', '.join(sorted(file.tensors)) or 'nothing'}; copy or export it again"
        )
    shapes = {key: tuple(value.shape) for key, value in file.tensors.items()}
    if (
        any(len(shape) != 2 or shape[0] == 0 for shape in shapes.values())
        or len({one[0] for one in shapes.values()}) != 1
    ):
        listed = " and ".join(f"{key} {shape}" for key, shape in sorted(shapes.items()))
        raise UserError(
            f"{file.path} should hold the same number of vectors, (n, D), for each text encoder, and it holds {listed}; copy or "
            f"export it again"
        )
    return {name: file.tensors[key] for key, name in names.items()}
