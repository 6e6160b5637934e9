"""Files of new tokens' embeddings, one for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_lora.adapters import check_finite
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, families
from lit_lora.families.new_tokens import check_placeholders, file_stem
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.embedding_file import DIFFUSERS, ENDINGS, holds_embedding, open_embedding
from lit_lora.formats.own_metadata import differing_own, file_metadata, foreign_metadata, own_entry, written_family
from lit_lora.formats.tensor_file import TensorFile, write_tensors
from lit_lora.visible import visible

TEXTUAL_INVERSION = "textual inversion"
"""Name of the method of an adapter that has new tokens alone."""
FOLDER = "embeddings"
"""Folder of these files in the folder of an adapter."""


def embedding_file(placeholder: str) -> str:
    """Path of a new token's file in the folder of an adapter."""
    return f"{FOLDER}/{file_stem(placeholder)}.safetensors"


def write_embeddings(adapter: AdapterFiles, folder: Path) -> None:
    """Write the new tokens of an adapter, if it has some.

    With one text encoder the token is the key, as ``load_textual_inversion`` of diffusers reads it; A1111, ComfyUI and sd-scripts
    take the only tensor, whatever its key, and name the token after the file. With two, the keys are the encoders' names
    ``clip_l`` and ``clip_g``, as diffusers' guide and all these programs have them.

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


def read_embeddings(path: Path, family: type[ModelFamily] | None = None) -> AdapterFiles:
    """Read new tokens, as an adapter with nothing else.

    Files of other programs that do not tell their token name it after the file.

    Args:
        path: Folder of an adapter, or the file of one new token, as this project, diffusers, A1111 or sd-scripts write it.
        family: Model family of the base; defaults to the one that the files tell.

    Raises:
        UserError: If a file is damaged, or belongs to another family or to one that is not imported; if two files are of one
            token, or of trainings on different bases.
    """
    tokens: dict[str, Mapping[str, Tensor]] = {}
    files: dict[str, Path] = {}
    found = AdapterFiles({}, {}, family=family)
    for one in embedding_files(path):
        token, file = open_embedding(one)
        entry = own_entry(file)
        if own := isinstance(entry.get("token"), str):
            token = entry["token"]
        if token in tokens:
            raise UserError(f"{files[token]} and {one} both hold the new token {token}; remove one of them")
        told = _family_of(entry, one, found.family) if own else found.family or _family_with(file)
        tokens[token], files[token] = _rows(file, token, told), one
        base = {"base_model_name_or_path": entry["base"]} if entry.get("base") else {}
        metadata = foreign_metadata(file)
        if own and len(tokens) > 1 and (different := differing_own(metadata, found.metadata)):
            raise UserError(
                f"{one} and the files beside it are of different trainings: their metadata differ in {different[0]}; keep the "
                f"new tokens of each training in a folder of their own"
            )
        found = AdapterFiles({}, {**base, **found.config}, found.metadata or metadata, told)
    check_placeholders(tokens)
    return replace(found, new_tokens=tokens)


def embeddings_in(path: Path, family: type[ModelFamily]) -> Mapping[str, Tensor]:
    """The embeddings of the token in a file, ``(n, D)``, by text encoder of a family; the token's name does not count.

    Args:
        path: File of a new token, as :func:`read_embeddings` reads it.
        family: Model family of the base.

    Raises:
        UserError: If there is no such file, it is damaged, holds NaN or Inf, or belongs to another family.
    """
    token, file = open_embedding(path)
    rows = _rows(file, own_entry(file).get("token", token), family)
    check_finite(rows, f"embedding {path}", "use one that was saved earlier")
    return rows


def embedding_files(path: Path) -> list[Path]:
    """The files of new tokens in the folder of an adapter or of diffusers' scripts, or the path itself if it is such a file."""
    if not path.is_dir():
        return [path] if holds_embedding(path) else []
    found = sorted(file for file in (path / FOLDER).glob("*") if file.suffix in ENDINGS)
    return found or [file for ending in ENDINGS if (file := path / f"{DIFFUSERS}{ending}").is_file()][:1]


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


def _family_with(file: TensorFile) -> type[ModelFamily]:
    """The family whose text encoders the tensors of another program's file are for; the first with one encoder, or with these."""
    keys = {*file.tensors}
    fitting = [
        kind
        for kind in families()
        if kind.token_encoders
        and (keys == {*kind.token_encoders.values()} or len(kind.token_encoders) == len(keys) == 1)
    ]
    if not fitting:
        raise UserError(
            f"{file.path} is no embedding that this version reads: it holds {_shown(file)}, and should hold one tensor, or "
            f"clip_l and clip_g; export it again"
        )
    return min(fitting, key=lambda kind: len(kind.__mro__))  # a family of this project rather than one derived from it


def _shown(file: TensorFile) -> str:
    names = sorted(file.tensors)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(visible(name, 80) for name in names[:3]) or "nothing") + more


def _rows(file: TensorFile, token: str, family: type[ModelFamily]) -> dict[str, Tensor]:
    """The embeddings of a token, ``(n, D)``, by text encoder."""
    encoders = family.token_encoders
    if len(encoders) == len(file.tensors) == 1:
        names = dict(zip(file.tensors, encoders, strict=True))
    else:
        names = {key or token: name for name, key in encoders.items()}
    if names.keys() != file.tensors.keys():
        raise UserError(
            f"{file.path} should hold {' and '.join(names)} for {family.__name__}, and it holds {_shown(file)}; copy or export "
            f"it again, or name the base that it was trained on"
        )
    # diffusers' older scripts wrote one vector as (D,)
    tensors = {key: value[None] if value.ndim == 1 else value for key, value in file.tensors.items()}
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    if (
        any(len(shape) != 2 or shape[0] == 0 for shape in shapes.values())
        or len({one[0] for one in shapes.values()}) != 1
    ):
        listed = " and ".join(f"{key} {shape}" for key, shape in sorted(shapes.items()))
        raise UserError(
            f"{file.path} should hold the same number of vectors, (n, D), for each text encoder, and it holds {listed}; copy or "
            f"export it again"
        )
    return {name: tensors[key] for key, name in names.items()}
