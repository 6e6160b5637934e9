"""Weight files of diffusers models."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_lora.errors import UserError
from lit_lora.quantization.saved_quantized import saved_quantized
from lit_lora.tensor_reader import TensorReader

DIFFUSERS_STEM = "diffusion_pytorch_model"
"""Start of the names of diffusers' weight files."""
TRANSFORMERS_STEM = "model"
"""Start of the names of transformers' weight files."""


def weight_files(
    source: str, folder: str, revision: str | None, variant: str | None, stem: str = DIFFUSERS_STEM
) -> list[Path]:
    """Local paths of a model's weight files; files on the hub are downloaded.

    Args:
        source: Local folder or hub id.
        folder: Subfolder of the model.
        revision: Branch, tag or commit on the hub.
        variant: Variant of the weight files, such as ``fp16``.
        stem: Start of the files' names; defaults to that of diffusers' files.

    Raises:
        FileNotFoundError: If there are no weight files, or one that an index lists is missing.
    """
    infix = f".{variant}" if variant else ""
    tried = []
    for suffix in ("safetensors", "bin"):
        whole, parts_list = f"{stem}{infix}.{suffix}", f"{stem}.{suffix}.index{infix}.json"
        for candidate in (whole, parts_list):
            tried.append(candidate)
            path = _local_file(source, folder, candidate, revision)
            if path is None:
                continue
            if path.suffix != ".json":
                return [path]
            parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            found = [_local_file(source, folder, part, revision) for part in parts]
            missing = [part for part, file in zip(parts, found, strict=True) if file is None]
            if missing:
                raise FileNotFoundError(f"{path.name} lists {missing[0]}, which is missing")
            return [file for file in found if file is not None]
    where = "there" if Path(source).is_dir() else "on the hub, or in the local cache without a connection"
    raise FileNotFoundError(f"no weights {where}: none of {', '.join(tried)}")


def _local_file(source: str, folder: str, name: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / folder / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, subfolder=folder, revision=revision))
    except EntryNotFoundError:  # also without a connection if the file is not in the cache
        return None


class StoredTensors:
    """Tensors in weight files, by their names there; weights that were saved quantized are restored one by one.

    Args:
        files: The files.
        method: Method by which the weights were quantized when they were saved; None if they were not.

    Raises:
        OSError: If a file is damaged.
        UserError: If the files are pickled, and the method is torchao's.
    """

    def __init__(self, files: Sequence[Path], method: str | None) -> None:
        pickled = [file for file in files if file.suffix == ".bin"]
        if pickled and method == "torchao":
            raise UserError(
                f"{pickled[0]} holds pickled classes of torchao, which depend on its version; save the model as safetensors, "
                f"with torchao 0.16 or later, or name it in bf16 or fp16"
            )
        self._unpickled = {file: _unpickled(file, "cpu") for file in pickled}
        self._readers = {file: TensorReader(file) for file in files}
        metadata: dict[str, str] = {}
        self._files = {name: file for file in files for name in self._saved_names(file, metadata)}
        self._quantized = {} if method is None else saved_quantized(self._files, metadata)
        hidden = {part for weight in self._quantized.values() for part in weight.parts}
        self.names = [*self._quantized, *(name for name in self._files if name not in hidden)]
        """Names of the weights."""
        if self._quantized:
            rank_zero_info(
                f"{len(self._quantized)} weights of {files[0].parent} were quantized by {method} when they were saved: each is "
                f"restored, and then stored as this run's quantization says; their quality stays that of the files"
            )

    def tensor(self, name: str) -> Tensor:
        """Read one weight, which may share memory with its file.

        Raises:
            OSError: If the file is damaged.
            UserError: If it was quantized in a way that cannot be read.
        """
        quantized = self._quantized.get(name)
        if quantized is None:
            return self._saved(name)
        return quantized.restore({part: self._saved(part) for part in quantized.parts})

    def _saved(self, name: str) -> Tensor:
        file = self._files[name]
        if file in self._unpickled:
            return self._unpickled[file][name]
        return self._readers[file].tensor(name)

    def _saved_names(self, file: Path, metadata: dict[str, str]) -> list[str]:
        """Names of the tensors in a file, whose metadata are added to the others'."""
        if file in self._unpickled:
            return list(self._unpickled[file])
        try:
            with safe_open(file, framework="pt") as opened:
                own = dict(opened.metadata() or {})
                listed = [json.loads(one.pop("tensor_names", "[]")) for one in (metadata, own)]
                metadata |= own | {"tensor_names": json.dumps([*listed[0], *listed[1]])}
                return list(opened.keys())
        except SafetensorError as error:
            raise OSError(f"{file} is damaged: {error}") from error


class WeightFiles:
    """Tensors in a model's weight files, by the model's own names.

    Args:
        model: The model; only its names are used.
        names: Names of all its weights.
        files: Its weight files.
        method: Method by which the weights were quantized when they were saved; defaults to none.

    Raises:
        OSError: If a file is damaged.
        UserError: If the files do not hold exactly the model's weights, or cannot be read.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], files: Sequence[Path], method: str | None = None
    ) -> None:
        self._stored = StoredTensors(files, method)
        renamed: dict[str, Any] = {name: name for name in self._stored.names}
        # Older files may use other names; diffusers translates them.
        rename: Any = getattr(model, "_fix_state_dict_keys_on_load", None)
        if rename is not None:
            rename(renamed)
        check_weights(files[0], model, names, renamed)
        self._saved_names = renamed

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, which may share memory with its file.

        Raises:
            OSError: If the file is damaged.
        """
        return self._stored.tensor(self._saved_names[name])


def check_weights(file: Path, model: nn.Module, names: Sequence[str], found: Collection[str]) -> None:
    """Check that a model's files hold exactly its weights.

    Args:
        file: The first file, for the error.
        model: The model, for the error.
        names: Names of all its weights.
        found: Names of the weights in the files.

    Raises:
        UserError: If weights are missing or unknown.
    """
    unknown, missing = set(found) - set(names), set(names) - set(found)
    if unknown or missing:
        several = [
            f"{len(some)} {what}, the first: {min(some)}"
            for what, some in (
                ("weights are not in the file", missing),
                ("weights of the file are not in the model", unknown),
            )
            if some
        ]
        raise UserError(f"{file} does not hold this {type(model).__name__}: {'; '.join(several)}")


def _unpickled(file: Path, device: str) -> dict[str, Tensor]:
    try:
        # Files from before torch 1.6 cannot be mapped.
        weights: dict[str, Tensor] = torch.load(
            file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise OSError(f"{file} is damaged: {error}") from error
    return weights
