"""Files of new tokens' embeddings, one for each token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.families.new_tokens import file_stem
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.own_metadata import file_metadata, own_entry, written_family
from lit_lora.formats.tensor_file import TensorFile, write_tensors

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
    (folder / FOLDER).mkdir(exist_ok=True)
    for placeholder, rows in adapter.new_tokens.items():
        tensors = {adapter.family.token_encoders[name] or placeholder: value for name, value in rows.items()}
        own = {"token": placeholder, "base": str(adapter.main_config.get("base_model_name_or_path") or "")}
        write_tensors(folder / embedding_file(placeholder), tensors, file_metadata(adapter, more=own))


def read_embeddings(folder: Path, family: type[ModelFamily] | None = None) -> AdapterFiles:
    """Read the new tokens in an adapter's folder, as an adapter with nothing else.

    Files that do not tell their token, as those of other programs, are passed over.

    Args:
        folder: Folder of an adapter.
        family: Model family of the base; defaults to the one that the files tell.

    Raises:
        UserError: If a file is damaged, or belongs to another family.
    """
    tokens: dict[str, Mapping[str, Tensor]] = {}
    told: type[ModelFamily] | None = None
    config: dict[str, str] = {}
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        file = TensorFile.open(path)
        entry = own_entry(file)
        told, token = written_family(entry), entry.get("token")
        if told is None or not isinstance(token, str):
            continue
        if family is not None and not (issubclass(family, told) or issubclass(told, family)):
            raise UserError(f"{path} is a new token of {told.__name__}, not of {family.__name__}; name its own base")
        names = {key or token: name for name, key in told.token_encoders.items()}
        if names.keys() != file.tensors.keys():
            raise UserError(
                f"{path} should hold {' and '.join(names)} for {told.__name__}, and it holds "
                f"{', '.join(sorted(file.tensors)) or 'nothing'}; copy or export it again"
            )
        tokens[token] = {name: file.tensors[key] for key, name in names.items()}
        config = {"base_model_name_or_path": entry["base"]} if entry.get("base") else {}
    return AdapterFiles({}, config, family=told, new_tokens=tokens)
