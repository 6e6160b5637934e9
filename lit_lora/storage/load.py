"""A denoiser with its frozen weights in a storage, read weight by weight."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_lora.errors import UserError
from lit_lora.storage.base import BaseStorage
from lit_lora.storage.frozen_layer import can_freeze, freeze_layer, freeze_remaining

_STEM = "diffusion_pytorch_model"
"""How diffusers' names for the files of a model's weights begin."""


def load_model(
    kind: Any,
    source: str,
    folder: str,
    storage: BaseStorage,
    dtype: torch.dtype,
    *,
    always_skipped: Sequence[str] = (),
    revision: str | None = None,
    variant: str | None = None,
) -> nn.Module:
    """A diffusers model, frozen, whose Linear and Conv2d layers are all :class:`~lit_lora.storage.frozen_layer.FrozenLayer`.

    Weights are read, stored and let go one by one, so that the model never exists in the precision of its file.

    Args:
        kind: The model's class.
        source: A local folder or hub id.
        folder: The model's folder in it.
        storage: How the weights of its layers are stored.
        dtype: Of everything else.
        always_skipped: Glob patterns of layers that stay in ``dtype`` whatever the storage.
        revision: Branch, tag or commit on the hub.
        variant: Weight files of this variant, such as ``fp16``.

    Raises:
        OSError: A file is missing or cannot be read.
        UserError: The files hold other weights than the model has.
    """
    options = {"revision": revision} if revision else {}
    config = kind.load_config(source, subfolder=folder, **options)
    with torch.device("meta"):
        model = kind.from_config(config)
    files = _weight_files(source, folder, revision, variant)
    names = _names_in_files(model, files)
    for file in files:
        for saved_name, tensor in _tensors(file):
            _put(model, names[saved_name], tensor, storage, dtype, always_skipped)
    _check_complete(model, names, files)
    _bring_computed_buffers(model, kind, config)
    freeze_remaining(model)
    return model.requires_grad_(False).eval()


def shape_model(
    kind: Any,
    source: str,
    folder: str,
    storage: BaseStorage,
    dtype: torch.dtype,
    *,
    always_skipped: Sequence[str] = (),
    revision: str | None = None,
) -> nn.Module:
    """What :func:`load_model` gives, made from the config alone: the values mean nothing.

    Args:
        kind: See :func:`load_model`, as for all arguments.
        source: Here only the config is read from it.
        folder: The model's folder in it.
        storage: How the weights of its layers are stored.
        dtype: Of everything else.
        always_skipped: Glob patterns of layers that stay in ``dtype``.
        revision: Branch, tag or commit on the hub.
    """
    options = {"revision": revision} if revision else {}
    model = kind.from_config(kind.load_config(source, subfolder=folder, **options)).requires_grad_(False)
    for name, parameter in list(model.named_parameters()):
        _put(model, name, parameter.detach(), storage, dtype, always_skipped)
    freeze_remaining(model)
    return model.eval()


def shape_part(kind: Any, source: str, folder: str, dtype: torch.dtype, revision: str | None = None) -> nn.Module:
    """A model of diffusers or transformers in ``dtype``, made from its config alone: the values mean nothing.

    Args:
        kind: The model's class.
        source: A local folder or hub id, from which only the config is read.
        folder: The model's folder in it.
        dtype: Of its weights.
        revision: Branch, tag or commit on the hub.
    """
    options = {"revision": revision} if revision else {}
    if hasattr(kind, "load_config"):
        model: nn.Module = kind.from_config(kind.load_config(source, subfolder=folder, **options))
    else:
        model = kind(kind.config_class.from_pretrained(source, subfolder=folder, **options))
    for layer in model.modules():  # not model.to(dtype), which cannot swap fake tensors
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    return model.requires_grad_(False).eval()


def _put(
    model: nn.Module, name: str, tensor: Tensor, storage: BaseStorage, dtype: torch.dtype, skipped: Sequence[str]
) -> None:
    """Give the model one of its weights, in its storage."""
    path, _, attribute = name.rpartition(".")
    layer = model.get_submodule(path)
    if attribute in layer._buffers:
        layer._buffers[attribute] = tensor.clone()
        return
    expected = layer._parameters[attribute]
    if expected is not None and expected.shape != tensor.shape:
        raise UserError(f"{name} is {tuple(tensor.shape)} in the file and {tuple(expected.shape)} in the model")
    kept_exact = any(part in name.split(".") for part in getattr(model, "_keep_in_fp32_modules", None) or ())
    floating = torch.float32 if kept_exact else dtype
    if attribute == "weight" and can_freeze(layer) and storage.takes(path, skipped) and not kept_exact:
        freeze_layer(layer, storage, tensor, dtype)
    else:
        tensor = tensor.to(floating if tensor.is_floating_point() else tensor.dtype, copy=True)
        layer._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)


def _weight_files(source: str, folder: str, revision: str | None, variant: str | None) -> list[Path]:
    """The model's files, all of them local."""
    infix = f".{variant}" if variant else ""
    tried = []
    for suffix in ("safetensors", "bin"):
        whole, parts_list = f"{_STEM}{infix}.{suffix}", f"{_STEM}.{suffix}.index{infix}.json"
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
                raise FileNotFoundError(f"{path.name} lists {missing[0]}, which is not there")
            return [file for file in found if file is not None]
    where = "there" if Path(source).is_dir() else "on the hub, or in its cache where there is no connection"
    raise FileNotFoundError(f"no weights {where}: none of {', '.join(tried)}")


def _local_file(source: str, folder: str, name: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / folder / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, subfolder=folder, revision=revision))
    except EntryNotFoundError:  # also where there is no connection and the file is not in the cache
        return None


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file, one at a time."""
    if file.suffix == ".bin":
        yield from _unpickled(file, "cpu").items()
        return
    for name in _saved_names(file):
        # Opened for each: what is read of a mapped file stays in memory until it is closed.
        try:
            with safe_open(file, framework="pt") as opened:
                tensor = opened.get_tensor(name)
        except SafetensorError as error:
            raise OSError(f"{file} is damaged: {error}") from error
        yield name, tensor


def _unpickled(file: Path, device: str) -> dict[str, Tensor]:
    try:
        # Files of before torch 1.6 cannot be mapped.
        weights: dict[str, Tensor] = torch.load(
            file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise OSError(f"{file} is damaged: {error}") from error
    return weights


def _saved_names(file: Path) -> list[str]:
    if file.suffix == ".bin":
        return list(_unpickled(file, "meta"))
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise OSError(f"{file} is damaged: {error}") from error


def _names_in_files(model: nn.Module, files: Sequence[Path]) -> dict[str, str]:
    """The model's name for each name that the files have; older files may have other ones, which diffusers knows."""
    renamed: dict[str, Any] = {name: name for file in files for name in _saved_names(file)}
    rename: Any = getattr(model, "_fix_state_dict_keys_on_load", None)
    if rename is not None:
        rename(renamed)
    own = {*dict(model.named_parameters()), *model.state_dict()}
    unknown = [name for name in renamed if name not in own]
    missing = [name for name in own if name not in renamed]
    if unknown or missing:
        several = [
            f"{len(found)} {what}, the first: {min(found)}"
            for what, found in (
                ("weights are not in the file", missing),
                ("weights of the file are not in the model", unknown),
            )
            if found
        ]
        raise UserError(f"{files[0]} does not hold this {type(model).__name__}: {'; '.join(several)}")
    return {saved: name for name, saved in renamed.items()}


def _check_complete(model: nn.Module, names: dict[str, str], files: Sequence[Path]) -> None:
    """Files of several parts may say that they have what they have not."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{files[0].parent} does not hold {name}")


def _bring_computed_buffers(model: nn.Module, kind: Any, config: Any) -> None:
    """Buffers that no file has: the model computes them when it is made."""
    absent = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if absent:
        with init_empty_weights():
            computed = dict(kind.from_config(config).named_buffers())
        for name in absent:
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = computed[name]
