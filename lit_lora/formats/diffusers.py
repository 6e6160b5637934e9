"""The LoRA file of diffusers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from torch import Tensor

from lit_lora.adapters.names import PREFIX
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats.base import AdapterFiles, AdapterFormat
from lit_lora.formats.lora import layers_of, lora_config, why_no_plain_lora
from lit_lora.formats.own_metadata import file_metadata, foreign_metadata, own_entry, written_family
from lit_lora.formats.tensor_file import TensorFile, write_tensors
from lit_lora.formats.text_encoders import normalized

_DENOISERS = ("unet", "transformer")
_MAGNITUDE = ".lora_magnitude_vector"
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class DiffusersFormat(AdapterFormat):
    """``pytorch_lora_weights.safetensors`` with the config in its metadata, for ``load_lora_weights`` of the pipeline."""

    name: ClassVar[str] = "diffusers"
    file_name: ClassVar[str] = LORA_WEIGHT_NAME_SAFE

    def why_not(self, adapter: AdapterFiles) -> str:
        if reason := why_no_plain_lora(adapter):
            return reason
        if adapter.family is None:
            return "the model family is not known, and the pipeline with it"
        pipeline = adapter.family.pipeline_class
        if not hasattr(pipeline, "save_lora_weights"):
            return f"{pipeline.__name__} has no LoRA files"
        takes = inspect.signature(pipeline.save_lora_weights).parameters
        others = [name for name in adapter.text_encoders if f"{name}_lora_layers" not in takes]
        return f"LoRA files of {pipeline.__name__} do not hold {others[0]}" if others else ""

    def write(self, adapter: AdapterFiles, folder: Path) -> None:
        assert adapter.family is not None, "see why_not"
        layers: dict[str, Any] = {}
        configs: dict[str, Any] = {}
        for part, contents in adapter.parts.items():
            name = adapter.family.denoiser_name if part == "denoiser" else part
            ending = ""
            if part != "denoiser":
                contents = normalized(contents)  # diffusers knows the names of older transformers
                ending = ".weight"  # transformers reads these for diffusers, and passes over PEFT's name without a word
            layers[f"{name}_lora_layers"] = {
                f"{key.removeprefix(PREFIX)}{ending if key.endswith(_MAGNITUDE) else ''}": value
                for key, value in contents.state.items()
            }
            configs |= {f"{name}.{key}": value for key, value in contents.config.items()}
        metadata = file_metadata(adapter)
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(configs, indent=2, sort_keys=True)
        # diffusers' own function for writing takes no further metadata.
        write = partial(_write, metadata=metadata)
        adapter.family.pipeline_class.save_lora_weights(folder, save_function=write, **layers)

    def recognizes(self, file: TensorFile) -> bool:
        parts = {name.partition(".")[0] for name in file.tensors}
        return bool(parts) and parts <= {*_DENOISERS, *_ENCODERS}

    def read(self, file: TensorFile, family: type[ModelFamily] | None = None) -> AdapterFiles:
        entry = own_entry(file)
        family = family or written_family(entry)
        configs = _configs(file)
        parts: dict[str, AdapterFiles] = {}
        for name in (*_DENOISERS, *_ENCODERS):
            found = {
                key.removeprefix(f"{name}."): value for key, value in file.tensors.items() if key.startswith(f"{name}.")
            }
            if configs.get(name) and not found:
                raise UserError(f"{file.path} is incomplete: it holds no tensors of {name}; copy or export it again")
            if found:
                parts[name] = _read_part(found, configs.get(name), file.path)
        denoisers = [name for name in parts if name in _DENOISERS]
        if len(denoisers) > 1 or (family is not None and [family.denoiser_name] != denoisers and denoisers):
            expected = "a unet or a transformer" if family is None else f"a {family.denoiser_name} ({family.__name__})"
            raise UserError(f"{file.path} holds an adapter of a {' and a '.join(denoisers)}, not of {expected}")
        denoiser = parts[denoisers[0]] if denoisers else AdapterFiles({}, {})
        return AdapterFiles(
            state=denoiser.state,
            config=denoiser.config,
            metadata=foreign_metadata(file),
            family=family,
            denoiser_config=entry.get("denoiser_config", {}),
            text_encoders={name: normalized(parts[name]) for name in _ENCODERS if name in parts},
        )


def _write(weights: Mapping[str, Tensor], path: str, metadata: Mapping[str, str]) -> None:
    write_tensors(Path(path), weights, metadata)


def _configs(file: TensorFile) -> dict[str, dict[str, Any]]:
    """The PEFT configs in a file's metadata by part; files of older versions of diffusers have none."""
    try:
        entries: dict[str, Any] = json.loads(file.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        configs: dict[str, dict[str, Any]] = {}
        for key, value in entries.items():
            part, _, option = key.partition(".")
            configs.setdefault(part, {})[option] = value
    except (ValueError, AttributeError) as error:
        raise UserError(f"the metadata of {file.path} is damaged: {error}; export the adapter again") from error
    return configs


def _without_weight(key: str) -> str:
    """PEFT's name of a tensor; in files, magnitudes of text encoders end in ``.weight``, too."""
    return key.removesuffix(".weight") if key.endswith(f"{_MAGNITUDE}.weight") else key


def _read_part(tensors: Mapping[str, Tensor], config: dict[str, Any] | None, path: Path) -> AdapterFiles:
    """One part's adapter, from the names that any version of diffusers writes."""
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    weights = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    if any(".lora_A." not in key and ".lora_B." not in key and _MAGNITUDE not in key for key in weights):
        try:
            weights = convert_unet_state_dict_to_peft(convert_state_dict_to_peft(weights))
        except ValueError:  # names of diffusers' older versions alone
            weights = convert_unet_state_dict_to_peft(weights)
    if len(weights) + len(alphas) < len(tensors):
        raise UserError(f"{path} holds tensors of one layer under two names; copy or export it again")
    state = {PREFIX + _without_weight(key): value for key, value in weights.items()}
    layers = layers_of(state, path)
    if unknown := sorted(alphas.keys() - layers.keys()):
        raise UserError(f"{path} has an alpha of {unknown[0]}, of which it holds no layer; copy or export it again")
    return AdapterFiles(state, config or lora_config(layers, alphas))
