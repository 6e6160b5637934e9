"""An adapter in a module of another project: its layers are replaced where they are, and nothing is wrapped around them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lit_lora.adapters.inject import ADAPTER_NAME, inject
from lit_lora.adapters.keys import plain_config
from lit_lora.adapters.methods import method_of
from lit_lora.adapters.state import adapter_state
from lit_lora.errors import UserError
from lit_lora.quantization import Quantization
from lit_lora.quantization.frozen_layer import can_freeze, freezable, freeze_layer

_MARK = "_lit_lora_in_place"
_COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names of a module's parameters."""


@dataclass(frozen=True)
class AdapterInPlace:
    """An adapter whose layers are inside a module that does not know of it.

    Attributes:
        model: View of the adapted part with PEFT's methods; the module itself does not hold it.
        path: Path of the adapted part in the module; "" for the module itself.
        config: Config from which the adapter was made, in JSON's types.
    """

    model: PeftModel
    path: str
    config: dict[str, Any]

    @property
    def root(self) -> nn.Module:
        """The adapted part."""
        base: nn.Module = self.model.get_base_model()
        return base

    def files(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Tensors and config of the adapter for PEFT's files; a collective call where the strategy shards weights."""
        state = {key.replace(_COMPILED, ""): value for key, value in adapter_state(self.model).items()}
        config = plain_config(self.model.peft_config[ADAPTER_NAME])
        if isinstance(targets := config.get("target_modules"), list):
            config["target_modules"] = [target.replace(_COMPILED, "") for target in targets]
        base = {
            "base_model_name_or_path": getattr(self.root, "name_or_path", None) or "",
            "auto_mapping": {
                "base_model_class": type(self.root).__name__,
                "parent_library": type(self.root).__module__,
            },
        }
        return method_of(self.model.peft_config[ADAPTER_NAME]).export(self.model, state, config | base)


def adapter_in(module: nn.Module) -> AdapterInPlace | None:
    """The adapter that :func:`adapt_in_place` has put into a module; None if there is none."""
    found: AdapterInPlace | None = module.__dict__.get(_MARK)
    return found


def peft_models(module: nn.Module) -> Iterator[tuple[str, PeftModel]]:
    """All adapted models in a module, each with the path of its layers: theirs is ``{path}.{name in the model}``."""
    for path, child in module.named_modules():
        if isinstance(child, PeftModel):
            yield ".".join(filter(None, (path, "base_model.model"))), child
    if (adapter := adapter_in(module)) is not None:
        yield adapter.path, adapter.model


def adapt_in_place(
    module: nn.Module,
    config: PeftConfig,
    path: str = "",
    quantization: Quantization | None = None,
    also_train: Sequence[str] = (),
) -> AdapterInPlace:
    """Freeze a module and put an adapter into a part of it; a second call with the same settings changes nothing.

    Args:
        module: Module to change in place.
        config: PEFT config; it is copied.
        path: Path of the part to adapt; defaults to the whole module.
        quantization: Quantization of the frozen Linear and Conv2d layers of the part; defaults to none.
        also_train: Glob patterns of parameters outside the part that stay as they are; defaults to none.

    Raises:
        UserError: If the part or the layers do not exist or cannot be adapted: see :func:`lit_lora.adapters.inject`.
    """
    settings = plain_config(config) | {"path": path}
    if (before := adapter_in(module)) is not None:
        _check_again(before, settings)
        return before
    root = _part(module, path)
    _check_adaptable(module, root)
    kept = _kept(module, root, path, also_train)
    module.requires_grad_(False)
    if quantization is not None:
        _quantize(root, quantization, getattr(config, "modules_to_save", None) or ())
    with (
        torch.device("cpu"),
        warnings.catch_warnings(),
    ):  # PEFT then moves it to the base; one seed, one initial adapter
        warnings.filterwarnings("ignore", r".*(tie_word_embeddings|tied_target_modules)")  # ours below names the layers
        model = inject(root, copy.deepcopy(config), ())
    for parameter in kept:
        parameter.requires_grad_(True)
    _check_shared_layers(root)
    _check_fast_path(root)
    _warn_of_shared_weights(module)
    adapter = AdapterInPlace(model, path, settings)
    module.__dict__[_MARK] = adapter
    return adapter


def _part(module: nn.Module, path: str) -> nn.Module:
    try:
        part = module.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in module.named_children())
        raise UserError(
            f"module={path!r} is no part of {type(module).__name__}, which has {names or 'none'}"
        ) from error
    return part._orig_mod if isinstance(part, OptimizedModule) else part


def _check_again(before: AdapterInPlace, settings: dict[str, Any]) -> None:
    changed = [name for name, value in settings.items() if before.config.get(name) != value]
    if changed:
        listed = "; ".join(f"{name} is {settings[name]!r}, was {before.config.get(name)!r}" for name in changed)
        raise UserError(f"the module has an adapter of other settings already: {listed}; train with a new module")


def _check_adaptable(module: nn.Module, root: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            raise UserError(
                f"{type(module).__name__} has an adapter of its own already, in {name}; remove LoraInjection, or that adapter"
            )
    for name, parameter in root.named_parameters():
        if is_lazy(parameter):
            raise UserError(
                f"{name} has no shape before the first forward pass, so that no adapter fits: give the layer its input size, "
                f"or call the model once in configure_model"
            )
        if isinstance(parameter, DTensor):
            raise UserError(
                f"{name} is sharded before the adapter is there, which would leave the adapter out of the sharding: remove "
                f"fully_shard from configure_model; strategy lit_lora_fsdp shards the module"
            )


def _kept(module: nn.Module, root: nn.Module, path: str, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters outside the adapted part that stay trainable."""
    inside = {id(parameter) for parameter in root.parameters()}
    kept: list[nn.Parameter] = []
    for pattern in patterns:
        found = {name: p for name, p in module.named_parameters() if fnmatchcase(name, pattern)}
        if not found:
            raise UserError(
                f"also_train: {pattern!r} matches no parameter of {type(module).__name__}; its first is "
                f"{next((name for name, _ in module.named_parameters()), 'none')}"
            )
        for name, parameter in found.items():
            if id(parameter) in inside:
                layer = name.removeprefix(f"{path}.").rpartition(".")[0]
                raise UserError(
                    f"also_train: {name} lies in the adapted part, whose files PEFT must be able to read: set the adapter's "
                    f"modules_to_save: [{layer}]"
                )
        kept += found.values()
    return kept


def _quantize(root: nn.Module, quantization: Quantization, trained: Sequence[str]) -> None:
    quantization.check_skipped(freezable(root))
    found = False
    shared = {id(weight) for weight, layers in _users_of_weights(root) if len(layers) > 1}
    for name, layer in root.named_modules():
        weight = layer._parameters.get("weight")
        saved = any(re.match(rf"(^|.*\.){option}($|\..*)", name) for option in trained)  # as PEFT compares them
        if weight is None or saved or id(weight) in shared:
            continue
        if can_freeze(layer) and quantization.takes(name):
            freeze_layer(layer, quantization, weight.detach(), weight.dtype)
            found = True
    if not found:
        raise UserError(
            f"quantization={type(quantization).__name__} has no effect, since {type(root).__name__} has no frozen Linear or "
            f"Conv2d layer with a weight of its own; leave it out, or name another module"
        )


def _check_shared_layers(root: nn.Module) -> None:
    """Refuse layers that are in several places: PEFT replaces the first alone."""
    adapted = {id(layer.get_base_layer()): name for name, layer in _adapted_layers(root)}
    for path, parent in root.named_modules():
        if isinstance(parent, BaseTunerLayer):
            continue
        for name, child in parent._modules.items():
            if id(child) in adapted:
                place = f"{path}.{name}".lstrip(".")
                raise UserError(
                    f"{adapted[id(child)]} and {place} are the same layer, and PEFT adapts it in the first place alone; leave it "
                    f"out of target_modules, or use it in one place"
                )


def _check_fast_path(root: nn.Module) -> None:
    """Refuse layers that torch computes in evaluation by a kernel that reads weights and passes adapters by."""
    if not torch.backends.mha.get_fastpath_enabled():
        return
    for name, layer in root.named_modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and any(_adapted_layers(layer)):
            raise UserError(
                f"{name or 'the module'} is an nn.TransformerEncoderLayer, which in evaluation reads its weights without the "
                f"adapter: call torch.backends.mha.set_fastpath_enabled(False), here and where the adapter is loaded later"
            )


def _warn_of_shared_weights(module: nn.Module) -> None:
    """Warn of an adapted layer whose weight another layer uses too, as tied embeddings do."""
    adapted = {id(layer.get_base_layer()): name for name, layer in _adapted_layers(module)}
    for _, layers in _users_of_weights(module):
        ours = [adapted[id(layer)] for _, layer in layers if id(layer) in adapted]
        others = [name for name, layer in layers if id(layer) not in adapted]
        if ours and others:
            warnings.warn(
                f"{ours[0]} shares its weight with {others[0]}: the adapter changes the first alone, and merging it would change "
                f"both. Leave it out of target_modules unless that is what you want",
                stacklevel=2,
            )


def _users_of_weights(root: nn.Module) -> Iterator[tuple[Tensor, list[tuple[str, nn.Module]]]]:
    """Each weight with the layers that have it."""
    users: dict[int, tuple[Tensor, list[tuple[str, nn.Module]]]] = {}
    for name, layer in root.named_modules():
        if (weight := layer._parameters.get("weight")) is not None:
            users.setdefault(id(weight), (weight, []))[1].append((name, layer))
    yield from users.values()


def _adapted_layers(module: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield name, layer
