"""Reads an adapter from whatever file or folder it is in."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_lora.adapters import check_finite
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, ModelSource, family_of
from lit_lora.finite import non_finite_names
from lit_lora.formats import FORMATS
from lit_lora.formats.base import AdapterFiles, AdapterFormat
from lit_lora.formats.embedding_file import DIFFUSERS
from lit_lora.formats.known_family import families_with
from lit_lora.formats.layer_names import underscored
from lit_lora.formats.lora import adapted_layer
from lit_lora.formats.own_metadata import differing_own
from lit_lora.formats.peft import CONFIG, WEIGHTS
from lit_lora.formats.tensor_file import TensorFile
from lit_lora.formats.textual_inversion import TEXTUAL_INVERSION, embedding_files, read_embeddings
from lit_lora.formats.unread import why_unread
from lit_lora.mapped import release
from lit_lora.visible import visible

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_adapter(path: str | Path, family: type[ModelFamily] | None = None) -> AdapterFiles:
    """Read an adapter from a file or folder of any format, which the names of its tensors tell, and a folder's new tokens.

    Args:
        path: A safetensors file, the file of a new token's embedding, or a folder that holds one adapter, whether in one format
            or in several.
        family: Model family of the base; defaults to the one that the file tells, if it tells one.

    Raises:
        UserError: If the path holds no adapter, or an incomplete one, values that are NaN, Inf or no floats, or an adapter
            for another family.
    """
    path = Path(path)
    tokens = read_embeddings(path, family)
    if tokens.new_tokens and not _holds_layers(path):
        adapter = tokens
    else:
        found, file = open_adapter(path)
        adapter = _joined(found.read(file, family), tokens, path)
    for token, rows in tokens.new_tokens.items():
        check_finite(rows, f"new token {token} in {path}", "use the adapter of an earlier checkpoint")
    for part in adapter.parts.values():
        _check_scales(part.config, path)
        _check_floats(part, path)
        check_finite(_non_finite(part.state), f"adapter {path}", "use the adapter of an earlier checkpoint")
    if adapter.family is None:
        adapter = _with_family(adapter)
    elif family is not None:
        check_family(adapter, family, path)
    return adapter


def adapter_files(path: str | Path) -> tuple[str, list[Path]]:
    """The name of an adapter's format and the files of tensors that :func:`read_adapter` reads, the main one first.

    Args:
        path: A safetensors file, or a folder that holds one adapter.

    Raises:
        UserError: If the path holds no adapter.
    """
    tokens = embedding_files(Path(path))
    if tokens and not _holds_layers(Path(path)):
        return TEXTUAL_INVERSION, tokens
    found, file = open_adapter(path)
    return found.name, [*found.files(file.path), *tokens]


def open_adapter(path: str | Path) -> tuple[AdapterFormat, TensorFile]:
    """The format of an adapter and its file of tensors.

    Args:
        path: A safetensors file, or a folder that holds one adapter, whether in one format or in several.

    Raises:
        UserError: If the path holds no adapter.
    """
    file = TensorFile.open(_file(Path(path)))
    found = next((one for one in FORMATS if one.recognizes(file)), None)
    if found is None:
        names = sorted(file.tensors)
        shown = ", ".join(visible(name, 80) for name in names[:3]) or "no tensors"
        if reason := why_unread(names):
            raise UserError(
                f"{file.path} holds {reason}, such as {shown}; merge it with its base, or convert it, in the program that wrote "
                f"it"
            )
        raise UserError(
            f"{file.path} is not an adapter that this version reads ({', '.join(one.name for one in FORMATS)}): it holds {shown}"
            + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        )
    return found, file


def _joined(layers: AdapterFiles, tokens: AdapterFiles, path: Path) -> AdapterFiles:
    """The adapter of layers in a folder with the new tokens beside it."""
    if not tokens.new_tokens:
        return layers
    one, other = layers.family, tokens.family
    if one is not None and other is not None and not issubclass(one, other) and not issubclass(other, one):
        raise UserError(
            f"{path} holds an adapter of {one.__name__} and new tokens of {other.__name__}; put them into folders of their own"
        )
    if different := differing_own(layers.metadata, tokens.metadata):
        warnings.warn(
            f"the adapter and the new tokens in {path} are of different trainings: their metadata differ in "
            f"{', '.join(different)}, and those of the new tokens are left out",
            stacklevel=3,
        )
    return replace(layers, new_tokens=tokens.new_tokens, family=one or other)


def _check_scales(config: Mapping[str, Any], path: Path) -> None:
    """Refuse alphas that are NaN or Inf, which would make all updates so."""
    values = {name: config.get(name) for name in ("lora_alpha", "alpha")}
    values |= {f"alpha_pattern[{layer!r}]": value for layer, value in (config.get("alpha_pattern") or {}).items()}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"the adapter {path} has {name}={value}, which is no scale; use the adapter of an earlier checkpoint"
            )


def _check_floats(part: AdapterFiles, path: Path) -> None:
    """Refuse matrices of integers, whose values mean nothing without the scales that they were quantized with."""
    if part.config.get("peft_type") not in ("LORA", "LOHA", "LOKR"):
        return  # others save indices
    for name, tensor in part.state.items():
        if tensor.ndim > 1 and not tensor.is_floating_point():  # not the counts of BatchNorm
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"the adapter {path} holds {visible(name, 120)} as {dtype}, and adapters are read from floats alone; "
                f"convert it to float16 with the program that quantized it"
            )


def _non_finite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that hold NaN or Inf; each is looked at and released by itself, so that the file is never in memory as a whole."""
    found = {}
    for name, tensor in tensors.items():
        if non_finite_names({name: tensor}):
            found[name] = tensor
        release(tensor)
    return found


_OF_RUNS = ("*.adapter", "checkpoints/*.adapter", "lightning_logs/version_*/checkpoints/*.adapter")
"""Places of adapters in a run's folder, from the innermost folder on."""


def _file(path: Path) -> Path:
    """The file of tensors at a path."""
    if path.suffix in _PICKLES:
        raise UserError(
            f"{path} may run code when it is read, and is no embedding of a token, which would be read without; convert it to "
            f"safetensors with the program that wrote it"
        )
    if not path.is_dir():
        return path
    if (path / CONFIG).is_file():  # PEFT's tensors belong to it
        return path / WEIGHTS
    known = [path / one.file_name for one in FORMATS if (path / one.file_name).is_file()]
    if known:
        return known[0]
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        below = next(
            (one for pattern in _OF_RUNS for one in sorted(path.glob(pattern), key=_by_numbers, reverse=True)), None
        )
        if below and not found:
            raise UserError(f"{path} is not an adapter's folder but has one; name it: {visible(below)}")
        names = ", ".join(visible(entry.name, 80) for entry in found[:5]) or "none"
        raise UserError(
            f"{path} is not an adapter folder: it should hold {WEIGHTS} or one other safetensors file, and it holds "
            f"{names}; name a file"
        )
    return found[0]


def _by_numbers(path: Path) -> list[str | int]:
    """Key that sorts version_10 after version_9; text and numbers take turns, so that like is compared with like."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", path.as_posix()))]


def _holds_layers(path: Path) -> bool:
    if not path.is_dir():
        return False
    return (path / CONFIG).is_file() or any(not file.name.startswith(DIFFUSERS) for file in path.glob("*.safetensors"))


def _with_family(adapter: AdapterFiles) -> AdapterFiles:
    """The adapter with the family of its base, if that is a pipeline on this machine, or else the one that its layers tell."""
    base = adapter.base
    if base and (source := ModelSource(base)).is_local:
        kind = family_of(str(source.index().get("_class_name")))
        if kind is not None:
            of_base = kind(base)
            of_base.read_configs()
            return replace(adapter, family=kind, denoiser_config=of_base.naming_config)
    found = families_of_layers(adapter)
    return replace(adapter, family=found[0]) if len(found) == 1 else adapter


def check_family(adapter: AdapterFiles, family: type[ModelFamily], path: str | Path) -> None:
    """Refuse layers that are certainly another family's.

    Args:
        adapter: Adapter whose file does not tell its family.
        family: Model family of the base.
        path: Where it was read from, for the error.

    Raises:
        UserError: If other families' published denoisers have all its layers, and this family's do not.
    """
    found = families_of_layers(adapter)
    if (
        adapter.denoiser_config
        or not found
        or any(issubclass(family, kind) or issubclass(kind, family) for kind in found)
    ):
        return
    raise UserError(
        f"{path} is an adapter of {' or '.join(kind.__name__ for kind in found)}, not of {family.__name__}: its layers are that "
        f"family's; name the base that it was trained on"
    )


def families_of_layers(adapter: AdapterFiles) -> list[type[ModelFamily]]:
    """The families whose published denoisers have all the adapted layers of the denoiser; none if no layer is adapted."""
    layers = {layer for key in adapter.state if (layer := adapted_layer(key))}
    return families_with({f"lycoris_{underscored(layer)}" for layer in layers}, adapter.metadata) if layers else []
