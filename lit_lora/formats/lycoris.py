"""The file of LyCORIS, which holds LoHa and LoKr beside LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lit_lora.adapters.names import PREFIX
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.families.native_layers import NativeLayer
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.hadamard_kronecker import METHODS, alphas_of, check_shapes, config_of, groups_of, why_not_exact
from lit_lora.formats.layer_file import Group, LayerFile, alpha_tensor
from lit_lora.formats.layer_names import TENSOR, Place, underscored
from lit_lora.formats.lora import why_no_plain_lora
from lit_lora.formats.model_spec import spec_metadata
from lit_lora.formats.tensor_file import TensorFile
from lit_lora.formats.text_encoders import nested

_PREFIX = "lycoris_"
_PREFIXES = (_PREFIX, "lora_unet_", "lora_te", "lora_transformer_")


class LycorisFormat(LayerFile):
    """``lycoris.safetensors``: layers under diffusers' names, such as ``lycoris_down_blocks_0_…``, as its wrapper writes them.

    It holds LoRA and DoRA, LoHa, and LoKr. PEFT computes OFT and BOFT in another way than LyCORIS, so they have no place here.
    """

    name: ClassVar[str] = "lycoris"
    file_name: ClassVar[str] = "lycoris.safetensors"

    def layers(self, family: type[ModelFamily], config: Mapping[str, Any]) -> Iterator[tuple[str, NativeLayer]]:
        for native in family.native_layers(config):
            for part in native.parts:
                yield _PREFIX + underscored(part), NativeLayer(part, (part,))

    def why_not(self, adapter: AdapterFiles) -> str:
        if not adapter.parts:
            return why_no_plain_lora(adapter)
        for part in adapter.parts.values():
            reason = why_not_exact(part) if part.config.get("peft_type") in METHODS else why_no_plain_lora(part)
            if reason:
                return reason
        return self.why_no_names(adapter)

    def groups(
        self, family: type[ModelFamily], config: Mapping[str, Any], part: str, contents: AdapterFiles
    ) -> Iterator[tuple[str, Group]]:
        if contents.config.get("peft_type") not in METHODS:
            yield from super().groups(family, config, part, contents)
            return
        prefix = _PREFIX if part == "denoiser" else f"{family.kohya_encoders[part]}_"
        alphas = alphas_of(contents)
        for layer, group in groups_of(contents).items():
            check_shapes(layer, group, "the adapter")
            name = prefix + underscored(layer if part == "denoiser" else nested(layer))
            yield name, {**group, "alpha": alpha_tensor(alphas[layer], next(iter(group.values())))}

    def spec(self, adapter: AdapterFiles) -> dict[str, str]:
        method = adapter.main_config.get("peft_type")
        return spec_metadata(adapter, {"LOHA": "loha", "LOKR": "lokr"}.get(str(method), "lora"))

    def recognizes(self, file: TensorFile) -> bool:
        found = [TENSOR.fullmatch(name) for name in file.tensors if name.startswith(_PREFIXES)]
        if not file.tensors or len(found) < len(file.tensors) or None in found:
            return False
        others = any(one is not None and one["tensor"].startswith(("hada", "lokr")) for one in found)
        return others or any(name.startswith(_PREFIX) for name in file.tensors)

    def part(
        self,
        family: type[ModelFamily],
        part: str,
        layers: Mapping[str, tuple[Place, Group]],
        own: Mapping[str, Any] | None,
        path: Path,
    ) -> AdapterFiles:
        kinds = {end.partition("_")[0] for _, group in layers.values() for end in group} & {"hada", "lokr"}
        if not kinds:
            return super().part(family, part, layers, own, path)
        if len(kinds) > 1:
            raise UserError(f"{path} holds LoHa and LoKr, and a PEFT adapter has one method; merge it with the base")
        groups: dict[str, Group] = {}
        for name, (place, group) in layers.items():
            if len(place.layer.parts) > 1 or place.layer.swapped:
                raise UserError(
                    f"{path}: {name} is {len(place.layer.parts)} layers in diffusers ({', '.join(place.layer.parts)}), and "
                    f"LoHa and LoKr cannot be divided among them; merge it with the base"
                )
            groups[place.layer.parts[0]] = group
        config = config_of(groups, kinds.pop(), own, path, family.denoiser_class if part == "denoiser" else None)
        state = {
            f"{PREFIX}{layer}.{end}": value
            for layer, group in sorted(groups.items())
            for end, value in group.items()
            if end != "alpha"
        }
        return AdapterFiles(state, config)
