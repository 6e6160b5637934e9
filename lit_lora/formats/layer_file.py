"""What the files of kohya's scripts, ComfyUI and LyCORIS have in common: one group of tensors with an alpha for each layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_lora.adapters.names import PREFIX
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.families.native_layers import NativeLayer
from lit_lora.formats.base import AdapterFiles, AdapterFormat
from lit_lora.formats.fused import LoraFactors, fuse, split
from lit_lora.formats.known_family import family_of_names
from lit_lora.formats.layer_names import TENSOR, Place, encoder_layers, places, underscored
from lit_lora.formats.lora import (
    adapted_layer,
    effective_alpha,
    fits,
    layers_of,
    lora_config,
    own_ranks,
    why_no_plain_lora,
)
from lit_lora.formats.model_spec import data_hash, spec_metadata
from lit_lora.formats.own_metadata import file_metadata, foreign_metadata, own_entry, written_family
from lit_lora.formats.tensor_file import TensorFile, write_tensors
from lit_lora.formats.text_encoders import nested, portable_config

Group = dict[str, Tensor]
"""The tensors of one layer by the ends of their names, such as ``lora_down.weight``."""


class LayerFile(AdapterFormat):
    """A safetensors file with one group of tensors for each layer, under names that depend on the model family."""

    @abstractmethod
    def layers(self, family: type[ModelFamily], config: Mapping[str, Any]) -> Iterator[tuple[str, NativeLayer]]:
        """All layers of the denoiser, each with the name under which it is written.

        Args:
            family: Model family.
            config: Config of the denoiser.
        """

    def why_not(self, adapter: AdapterFiles) -> str:
        return why_no_plain_lora(adapter) or self.why_no_names(adapter)

    def why_no_names(self, adapter: AdapterFiles) -> str:
        """The reason why layers of an adapter have no name in the format; empty if all have one."""
        family = adapter.family
        if family is None:
            return "the model family is not known, and the names of its layers with it"
        known = {part for _, layer in self.layers(family, adapter.denoiser_config) for part in layer.parts}
        if not known:
            return f"{family.__name__} has no names for its layers in this format"
        for part, contents in adapter.parts.items():
            if part != "denoiser" and part not in family.kohya_encoders:
                return f"{family.__name__} has no names for the layers of {part} in this format"
            allowed = known if part == "denoiser" else {*encoder_layers(family, part)}
            for layer in _layers(contents):
                if (layer if part == "denoiser" else nested(layer)) not in allowed:
                    return f"the layer {layer} of the {part} has no name in this format"
        return ""

    def write(self, adapter: AdapterFiles, folder: Path) -> None:
        assert adapter.family is not None, "see why_not"
        tensors: dict[str, Tensor] = {}
        for part, contents in adapter.parts.items():
            for name, group in self.groups(adapter.family, adapter.denoiser_config, part, contents):
                tensors |= {f"{name}.{end}": value for end, value in group.items()}
        path, metadata = folder / self.file_name, file_metadata(adapter, configs=True) | self.spec(adapter)
        write_tensors(path, tensors, metadata)
        write_tensors(path, tensors, metadata | data_hash(path))  # the header does not change the hash of the data

    def spec(self, adapter: AdapterFiles) -> dict[str, str]:
        """Entries of the file's metadata for other tools."""
        return spec_metadata(adapter)

    def groups(
        self, family: type[ModelFamily], config: Mapping[str, Any], part: str, contents: AdapterFiles
    ) -> Iterator[tuple[str, Group]]:
        """The groups of tensors to write for one part's adapter, each with its layer's name in the file.

        Args:
            family: Model family.
            config: Config of the denoiser.
            part: ``denoiser``, or the name of a text encoder.
            contents: Adapter of the part.
        """
        layers = _lora_layers(contents)
        if part != "denoiser":
            for layer, lora in layers.items():
                yield f"{family.kohya_encoders[part]}_{underscored(nested(layer))}", _group(lora)
            return
        for name, native in self.layers(family, config):
            parts = {layer: layers[layer] for layer in native.parts if layer in layers}
            if parts:
                yield name, _group(fuse(native, parts))

    def read(self, file: TensorFile, family: type[ModelFamily] | None = None) -> AdapterFiles:
        entry = own_entry(file)
        groups = _groups(file)
        config = entry.get("denoiser_config", {})
        family = family or written_family(entry) or family_of_names(groups, file)
        known = places(family, config)
        by_part: dict[str, dict[str, tuple[Place, Group]]] = {}
        names: dict[tuple[str, str], str] = {}
        for name, group in groups.items():
            place = known.get(name)
            if place is None:
                raise UserError(
                    f"{file.path} is not an adapter of {family.__name__}, which has no layer {name}; set the family of its base, "
                    f"or leave it out to have it found"
                )
            by_part.setdefault(place.part, {})[name] = place, group
            for layer in place.layer.parts:
                if (other := names.setdefault((place.part, layer), name)) != name:
                    raise UserError(
                        f"{file.path} holds the layer {layer} twice, as {other} and {name}; export it again"
                    )
        configs = entry.get("configs", {})
        if lost := sorted(configs.keys() - by_part.keys()):
            raise UserError(f"{file.path} is incomplete: it holds no tensors of {lost[0]}; copy or export it again")
        parts = {
            part: self.part(family, part, layers, configs.get(part), file.path) for part, layers in by_part.items()
        }
        denoiser = parts.pop("denoiser", AdapterFiles({}, {}))
        return AdapterFiles(
            denoiser.state, denoiser.config, foreign_metadata(file), family, config, dict(sorted(parts.items()))
        )

    def part(
        self,
        family: type[ModelFamily],
        part: str,
        layers: Mapping[str, tuple[Place, Group]],
        own: Mapping[str, Any] | None,
        path: Path,
    ) -> AdapterFiles:
        """One part's adapter.

        Args:
            family: Model family.
            part: ``denoiser``, or the name of a text encoder.
            layers: Places and tensors by the layers' names in the file.
            own: PEFT config in the file's metadata; None in files of other tools.
            path: The file, for errors.

        Raises:
            UserError: If tensors are missing or do not fit each other.
        """
        lora: dict[str, LoraFactors] = {}
        ranks = own_ranks(own)
        for name, (place, group) in layers.items():
            known = None if ranks is None else [ranks(layer) for layer in place.layer.parts]
            lora |= split(place.layer, _lora_layer(name, group, path), known)
        state: dict[str, Tensor] = {}
        for layer, one in sorted(lora.items()):
            state[f"{PREFIX}{layer}.lora_A.weight"] = one.down
            state[f"{PREFIX}{layer}.lora_B.weight"] = one.up
            if one.magnitude is not None:
                shape = (-1,) if one.up.ndim == 2 else (1, -1, *[1] * (one.up.ndim - 2))
                state[f"{PREFIX}{layer}.lora_magnitude_vector"] = one.magnitude.reshape(shape)
        alphas = {layer: one.alpha for layer, one in lora.items()}
        found = layers_of(state, path)
        if own is not None and fits(own, found, alphas):
            return AdapterFiles(state, own)
        if part != "denoiser":
            return AdapterFiles(state, portable_config(lora_config(found, alphas)))
        return AdapterFiles(state, lora_config(found, alphas, family.denoiser_class))


def _layers(contents: AdapterFiles) -> list[str]:
    return sorted({layer for key in contents.state if (layer := adapted_layer(key))})


def _lora_layers(contents: AdapterFiles) -> dict[str, LoraFactors]:
    return {
        layer: LoraFactors(
            tensors["lora_A.weight"],
            tensors["lora_B.weight"],
            effective_alpha(contents.config, layer, len(tensors["lora_A.weight"])),
            tensors.get("lora_magnitude_vector"),
        )
        for layer, tensors in layers_of(contents.state, "the adapter").items()
    }


def _group(lora: LoraFactors) -> Group:
    group = {"lora_down.weight": lora.down, "lora_up.weight": lora.up, "alpha": alpha_tensor(lora.alpha, lora.down)}
    if lora.magnitude is not None:
        group["dora_scale"] = lora.magnitude.reshape(-1, *[1] * (lora.down.ndim - 1))
    return group


def alpha_tensor(alpha: float, weight: Tensor) -> Tensor:
    """An alpha in a weight's dtype, or in float32 if that dtype would round it."""
    value = torch.tensor(alpha, dtype=weight.dtype)
    return value if float(value) == alpha else torch.tensor(alpha, dtype=torch.float32)


def _groups(file: TensorFile) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for name, value in file.tensors.items():
        found = TENSOR.fullmatch(name)
        assert found is not None, "see recognizes"
        end = found["tensor"].replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        group = groups.setdefault(found["layer"], {})
        if end in group:
            raise UserError(f"{file.path} holds {end} of {found['layer']} under two names; copy or export it again")
        group[end] = value
    return groups


def _lora_layer(name: str, group: Group, path: Path) -> LoraFactors:
    """The LoRA in a group of tensors."""
    if "lora_mid.weight" in group:
        raise UserError(
            f"{path}: {name} is a LoRA in three factors (lora_mid), which PEFT does not have; merge it with the base"
        )
    unknown = group.keys() - {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}
    if unknown:
        raise UserError(f"{path}: {name} has {min(unknown)}, and other layers have LoRA; a PEFT adapter has one method")
    down, up = group.get("lora_down.weight"), group.get("lora_up.weight")
    if down is None or up is None:
        missing = "lora_down" if down is None else "lora_up"
        raise UserError(f"{path} is incomplete: it has no {missing} of {name}; copy or export it again")
    if min(down.ndim, up.ndim) < 2 or up.shape[1] != len(down) or len(down) == 0:
        raise UserError(
            f"{path} is damaged: lora_down and lora_up of {name} have the shapes {tuple(down.shape)} and {tuple(up.shape)}, "
            f"which share no rank; export it again"
        )
    magnitude = group.get("dora_scale")
    if magnitude is not None and not (magnitude.ndim and len(magnitude) == magnitude.numel() == len(up)):
        raise UserError(
            f"{path}: dora_scale of {name} has the shape {tuple(magnitude.shape)}, while PEFT's DoRA has one magnitude for each "
            f"of the {len(up)} outputs; merge it with the base if these are magnitudes of inputs, or export it again"
        )
    alpha = group.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise UserError(f"{path} is damaged: alpha of {name} has the shape {tuple(alpha.shape)}; export it again")
    return LoraFactors(down, up, float(len(down) if alpha is None else alpha), magnitude)
