"""Merges an adapter into its base, weight by weight from disk to disk."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from lit_lora.adapter_tools.base_model import CONFIG, INDEX, BaseModel, comparable
from lit_lora.adapter_tools.lora_layer import LoraLayer, narrowed
from lit_lora.adapter_tools.plain_lora import Layers, beyond_lora, lora_layers
from lit_lora.adapter_tools.weight_stream import rewrite, shapes_in, widest_dtype
from lit_lora.adapters import load_adapter
from lit_lora.adapters.names import PREFIX, tuner_layers
from lit_lora.byte_sizes import format_bytes
from lit_lora.errors import UserError
from lit_lora.formats import AdapterFiles
from lit_lora.formats.base_records import base_records, told
from lit_lora.formats.quantized_base import quantized_base, twice
from lit_lora.formats.sampling_scheduler import scheduler_changes
from lit_lora.machine import available_memory
from lit_lora.mapped import release
from lit_lora.quantization.weight_change import COARSE, Rounding
from lit_lora.visible import visible

_TEXT_MODEL = "text_model."
_GROUPED = "PEFT's LoRA of a grouped convolution reaches all inputs, which the weight does not"
_WEIGHTS = ("*.safetensors", "*.safetensors.index*.json", "*.bin", "*.msgpack", "*.h5", "*.ckpt", "*.pt", "*.onnx*")


@dataclass(frozen=True)
class MergedBase:
    """What was merged.

    Args:
        layers: Number of changed weights by part.
        files: Number of weight files of the changed parts.
        rounding: What the dtypes of the files leave of the adapter.
    """

    layers: dict[str, int]
    files: int
    rounding: Rounding


def check_base(adapter: AdapterFiles, path: object, base: BaseModel) -> None:
    """Refuse an adapter of another family.

    Raises:
        UserError: If both families are known, and neither is derived from the other.
    """
    mine, its = adapter.family, base.family
    if mine is not None and its is not None and not issubclass(mine, its) and not issubclass(its, mine):
        raise UserError(
            f"{path} is an adapter of {mine.__name__}, and {base.path} is a {its.__name__} ({base.index.get('_class_name')}); "
            f"name the base that it was trained on"
        )


def check_changed_base(adapter: AdapterFiles, path: object, base: BaseModel) -> None:
    """Refuse an adapter whose training had a base with other weights than this one, and warn if that is not certain.

    Raises:
        UserError: If the adapter was made for a quantized base, or was trained over other adapters on this base.
    """
    if quantization := quantized_base(adapter.metadata):
        raise UserError(twice(path, quantization))
    if not (over := base_records(adapter.metadata)):
        return
    if adapter.base and comparable(adapter.base) == comparable(base.path):
        places, weights = " ".join(one["path"] for one in over), " ".join(str(one["weight"]) for one in over)
        raise UserError(
            f"{path} was trained over {told(over)}, which {base.path} lacks: merge these first, with lit-lora adapter merge "
            f"{places} merged_base --weights {weights} --into {base.path}, and then this one into merged_base"
        )
    warnings.warn(
        f"{path} was trained over {told(over)}: the result is right only if these are merged into {base.path} already",
        stacklevel=3,
    )


def merge_base(
    adapter: AdapterFiles, path: object, base: BaseModel, out: Path, denoiser_only: bool = False
) -> MergedBase:
    """Write a copy of the base whose weights include the adapter.

    LoRA and DoRA are merged one weight at a time, in float32, and the files keep their dtypes. For other methods the model is
    loaded and PEFT merges it.

    Args:
        adapter: Adapter.
        path: Where it was read from, for errors.
        base: Base with weights.
        out: Existing, empty folder. It gets the whole pipeline, or the model if the base is a single one.
        denoiser_only: Whether to write only the denoiser of a pipeline. Defaults to False.

    Raises:
        UserError: If the adapter is of another family, has new tokens or layers that the base does not have, or was trained on
            other weights; if the base's weights cannot be read, hold too much for the memory, or would overflow.
    """
    check_base(adapter, path, base)
    check_changed_base(adapter, path, base)
    if adapter.new_tokens:
        file = "give its file of layers, such as pytorch_lora_weights.safetensors, and " if adapter.parts else ""
        raise UserError(
            f"{path} has the new tokens {', '.join(adapter.new_tokens)}, which belong into the tokenizer and are not merged: "
            f"{file}load the tokens with load_textual_inversion"
        )
    parts = {name: base.part(name) for name in adapter.parts}
    if denoiser_only and (others := [name for name in parts if name != "denoiser"]):
        raise UserError(f"{path} also changes {others[0]}; write the whole pipeline, without denoiser_only")
    rounding = Rounding()
    targets = {name: out if denoiser_only or not folder else out / folder for name, folder in parts.items()}
    if beyond_lora(adapter):
        counts = {name: _merge_loaded(adapter, name, path, base, targets[name], rounding) for name in parts}
    else:
        layers = lora_layers(adapter, path)
        plans = {name: _plan(layers[name], path, base.weight_files(folder)) for name, folder in parts.items()}
        counts = {name: _merge_files(plans[name], base.folder / parts[name], targets[name], rounding) for name in parts}
    if base.is_pipeline and not denoiser_only:
        _copy_others(base, set(parts.values()), out)
    _set_scheduler(adapter, path, out / "scheduler" / "scheduler_config.json")
    if rounding.share > COARSE:
        warnings.warn(
            f"{out}: rounding to the dtype of the base's files adds an error of {rounding.share:.0%} to the adapter's change; "
            f"merge into the base in float32, or load the adapter beside the base",
            stacklevel=2,
        )
    files = sum(files for _, files in counts.values())
    return MergedBase({name: layers for name, (layers, _) in counts.items()}, files, rounding)


_Plan = dict[Path, dict[str, LoraLayer]]
"""Layers by the names of their weights in each file."""


def _plan(layers: Layers, path: object, files: list[Path]) -> _Plan:
    """The changed tensors of each file.

    Raises:
        UserError: If a layer is not in the files, or has another shape.
    """
    places = {
        _plain(name): (file, name, shape) for file, held in shapes_in(files).items() for name, shape in held.items()
    }
    plan: _Plan = {file: {} for file in files}
    missing = [layer for layer in layers if f"{_plain(layer)}.weight" not in places]
    if missing:
        raise UserError(
            f"{path} adapts {len(missing)} of {len(layers)} layers that {files[0].parent} does not have, the first is "
            f"{visible(missing[0], 120)}; name the base that it was trained on"
        )
    for layer, one in layers.items():
        file, name, shape = places[f"{_plain(layer)}.weight"]
        if shape != one.weight_shape:
            advice = _GROUPED if one.groups > 1 else "name the base that it was trained on"
            raise UserError(
                f"{path} does not fit: {visible(layer, 120)} has a weight of the shape {shape} in {file}, and the adapter "
                f"changes {one.weight_shape}; {advice}"
            )
        plan[file][name] = one
    return plan


def _plain(name: str) -> str:
    """A name without the level that transformers' CLIP models had up to version 4."""
    return name.removeprefix(_TEXT_MODEL)


def _merge_files(plan: _Plan, folder: Path, out: Path, rounding: Rounding) -> tuple[int, int]:
    """Write a model's folder with merged weights; returns the numbers of changed weights and of files."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*_WEIGHTS), dirs_exist_ok=True)
    for file, layers in plan.items():
        functions: dict[str, Callable[[Tensor], Tensor]] = {name: partial(_merged, one) for name, one in layers.items()}
        rewrite(file, out / file.name, functions, rounding)
    written = {file.name for file in plan}
    for listed in folder.glob("*.safetensors.index*.json"):
        if written.issuperset(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values()):
            shutil.copyfile(listed, out / listed.name)
    return sum(map(len, plan.values())), len(plan)


def _merged(layer: LoraLayer, weight: Tensor) -> Tensor:
    """The merged weight: ``W + dW``, and for DoRA ``m (W + dW) / |W + dW|`` in each row (Liu et al., 2024)."""
    weight += layer.delta()
    release(layer.down, layer.up)
    if layer.magnitude is not None:
        column = (-1, *[1] * (weight.ndim - 1))
        norms = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)))
        weight *= (layer.magnitude.detach().float().flatten() / norms).view(column)
    return weight


def _merge_loaded(
    adapter: AdapterFiles, name: str, path: object, base: BaseModel, out: Path, rounding: Rounding
) -> tuple[int, int]:
    """Have PEFT merge a loaded model; returns the numbers of adapted layers and of files."""
    if name != "denoiser":
        raise UserError(
            f"{path} changes {name}, and {beyond_lora(adapter)}; only LoRA and DoRA are merged into text encoders"
        )
    folder = base.folder / base.part(name)
    files = base.weight_files(base.part(name))
    needed, available = 2 * sum(file.stat().st_size for file in files), available_memory()
    if needed > available:
        raise UserError(
            f"{path} cannot be merged weight by weight, because {beyond_lora(adapter)}; loading and writing {folder} takes up to "
            f"{format_bytes(needed)} of memory, and {format_bytes(available)} are free"
        )
    variant = base.source.variant_of(base.part(name))
    options: dict[str, Any] = {"variant": variant} if variant else {}
    model = diffusers.AutoModel.from_pretrained(str(folder), dtype=widest_dtype(files, folder), **options)
    _count_whole(adapter, model, rounding)
    adapted = load_adapter(model, adapter.config, adapter.state, path)
    try:
        _merge_layers(adapted, rounding)
        merged: Any = adapted.unload()
    except (RuntimeError, ValueError, AttributeError) as error:
        raise UserError(f"PEFT cannot merge {path} ({adapter.config.get('peft_type')}): {error}") from error
    count = len(getattr(adapted.base_model, "targeted_module_names", []))
    merged.save_pretrained(out, **options)
    return count, len(list(out.glob("*.safetensors")))


def _count_whole(adapter: AdapterFiles, model: Any, rounding: Rounding) -> None:
    """Count what rounding leaves of weights that the adapter replaces (``modules_to_save``, biases): PEFT loads them in the
    dtypes of the model's own.

    Raises:
        UserError: If a value is beyond the dtype's range.
    """
    parameters = dict(model.named_parameters())
    for key, value in adapter.state.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name in parameters and parameters[name].shape == value.shape:  # loading tells other shapes
            old = parameters[name].data
            rounding.add(old, value.float(), narrowed(value.float(), old.dtype, name))


def _merge_layers(adapted: PeftModel, rounding: Rounding) -> None:
    """Have PEFT merge each layer in float32, round it to the dtype that it had, and count what that loses."""
    adapted.base_model._check_merge_allowed()
    for name, layer in tuner_layers(adapted, BaseTunerLayer):
        old = {key: value.data for key, value in layer.get_base_layer().named_parameters()}
        layer.get_base_layer().float()
        layer.merge(safe_merge=True)
        for key, value in layer.get_base_layer().named_parameters():  # LNTuning puts another layer there
            new = value.data.float()
            value.data = narrowed(new, old[key].dtype, f"{name}.{key}")
            rounding.add(old[key], new, value.data)


def _copy_others(base: BaseModel, merged: set[str], out: Path) -> None:
    """Copy the parts of a pipeline that the adapter does not change."""
    shutil.copyfile(base.folder / INDEX, out / INDEX)
    for name, entry in base.index.items():
        source = base.folder / name
        if isinstance(entry, list | tuple) and entry[0] is not None and name not in merged and source.is_dir():
            shutil.copytree(source, out / name)


def _set_scheduler(adapter: AdapterFiles, path: object, file: Path) -> None:
    """Give the written pipeline the scheduler that the adapter was trained for, or say what is missing."""
    changes = scheduler_changes(adapter.metadata)
    if not changes:
        return
    if not file.is_file():
        warnings.warn(
            f"{path} needs a scheduler with {changes}, and no scheduler is written: set this where it is used",
            stacklevel=3,
        )
        return
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = json.loads((file.parents[1] / INDEX).read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (file.parents[1] / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def marker(base: BaseModel, denoiser_only: bool) -> str:
    """Name of a file that the folder of :func:`merge_base` holds."""
    return INDEX if base.is_pipeline and not denoiser_only else CONFIG
