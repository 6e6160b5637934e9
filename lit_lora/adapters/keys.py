"""Keys and settings of a model that belong to its adapter."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lit_lora.errors import UserError
from lit_lora.finite import damaged_base, non_finite_names


def adapter_keys(module: nn.Module) -> set[str]:
    """The keys of ``module.state_dict()`` that are the adapter's.

    These are the trainable parameters and, in every layer that PEFT injected, all tensors that the layer itself declares to be
    its adapter's: some methods need buffers and frozen matrices beside the trainable parameters.
    """
    keys = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for path, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            own = {*layer.adapter_layer_names, *layer.other_param_names}
            prefix = f"{path}." if path else ""
            keys |= {prefix + key for key in layer.state_dict() if key.split(".", 1)[0] in own}
    return keys


def keep_only_adapter(state_dict: dict[str, Any], keys: set[str]) -> None:
    """Remove all entries of a state dict whose key is not in ``keys``, in place."""
    for key in [key for key in state_dict if key not in keys]:
        del state_dict[key]


def without_compiling(name: str) -> str:
    """Name of a parameter without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "")


def parameters_without_compiling(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters by their names before compiling, which a module may do after training has begun."""
    return {without_compiling(name): parameter for name, parameter in module.named_parameters()}


def check_adapter_state(module: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Check that a checkpoint's weights are those of this module's adapter; they get the names of layers that are compiled here.

    Args:
        module: Module with the adapter.
        state_dict: Weights from the checkpoint.

    Raises:
        UserError: If keys are missing or unknown, shapes differ, or values are NaN or Inf.
    """
    here = module.state_dict(keep_vars=True)
    _follow_compiling(here, state_dict)
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} in the checkpoint, {shape} here"
        for key, shape in _shapes(here).items()
        if key in state_dict and tuple(state_dict[key].shape) != shape
    ]
    check_finite(state_dict)
    missing, unknown = adapter_keys(module) - state_dict.keys(), state_dict.keys() - here.keys()
    if missing and unknown and not adapter_configs(module):
        raise UserError(
            f"the checkpoint holds {min(unknown)} and others that {type(module).__name__} does not have, which has no adapter; "
            f"add the callback LoraInjection, or whatever made the checkpoint's adapter, with the same settings"
        )
    _check_same(missing, unknown, shapes)


def _follow_compiling(module: Mapping[str, Any], state_dict: dict[str, Any]) -> None:
    """Give the entries of a state dict the names that they have in a module's, of which other layers are compiled, in place.

    A module that compiles itself in ``on_fit_start`` is not compiled yet when its checkpoint is read.
    """
    here = {without_compiling(name): name for name in module}
    for name in list(state_dict):
        own = here.get(without_compiling(name), name)
        if own != name:
            state_dict[own] = state_dict.pop(name)


def check_loaded(module: nn.Module, incompatible: Any) -> None:
    """Post-hook of ``load_state_dict`` for a module whose frozen base is not in its checkpoints: the adapter must be there.

    The base's keys are removed from the missing ones, so that nothing warns of them.

    Args:
        module: Module with the adapter.
        incompatible: torch's lists of missing and unexpected keys.

    Raises:
        UserError: If keys of the adapter are missing, or there are others in the models that it adapts.
    """
    adapted = tuple(f"{path}." for path, _ in adapted_models(module))
    unknown = [key for key in incompatible.unexpected_keys if key.startswith(adapted)]
    _check_same(adapter_keys(module).intersection(incompatible.missing_keys), unknown)
    base = dict(module.named_parameters()).keys() | dict(module.named_buffers()).keys()
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in base]


def _check_same(missing: Collection[str], unknown: Collection[str], shapes: Collection[str] = ()) -> None:
    problems = [
        f"{len(found)} {what}, the first: {min(found)}"
        for what, found in (
            ("tensors of this adapter are not in the checkpoint", missing),
            ("tensors of the checkpoint are not in this adapter", unknown),
            ("tensors have another shape", shapes),
        )
        if found
    ]
    if problems:
        raise UserError(
            "the checkpoint holds another adapter:\n  " + "\n  ".join(problems) + "\n"
            "Load it with the adapter settings that it was made with, or start without ckpt_path."
        )


def check_finite(
    tensors: Mapping[str, Tensor],
    what: str = "checkpoint",
    advice: str = "resume from an earlier checkpoint",
    base: nn.Module | None = None,
) -> None:
    """Check that tensors hold no NaN or Inf.

    Args:
        tensors: Tensors by name.
        what: What they are in, for the error.
        advice: What to do, for the error.
        base: Module that may be damaged itself, which the error then tells. Defaults to none.

    Raises:
        UserError: If some values are NaN or Inf.
    """
    if bad := non_finite_names(tensors):
        advice = (base is not None and damaged_base(base)) or advice
        raise UserError(f"{len(bad)} tensors of the {what} hold NaN or Inf, the first is {bad[0]}; {advice}")


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    # A parameter that DeepSpeed has sharded is empty; ds_shape is its full shape.
    return {
        key: tuple(getattr(value, "ds_shape", value.shape))
        for key, value in tensors.items()
        if isinstance(value, Tensor)
    }


def plain_config(config: PeftConfig) -> dict[str, Any]:
    """The config in JSON's types, equal in every process for equal configs."""
    # PEFT lists sets in iteration order, which differs between processes.
    sets = {name: sorted(value) for name, value in vars(config).items() if isinstance(value, set)}
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict() | sets, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "value", None) or repr(value)


def adapted_models(module: nn.Module) -> Iterator[tuple[str, Mapping[str, PeftConfig]]]:
    """Paths of the models in a module that PEFT has adapted, each with its configs by the adapter's name.

    These are every ``PeftModel``, and models in which PEFT has only replaced layers.
    """
    inside: tuple[str, ...] = ()
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        configs = getattr(child, "peft_config", None)
        if isinstance(configs, Mapping) and configs and not prefix.startswith(inside):
            inside = (*inside, prefix)
            yield path, configs


def adapter_configs(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The configs of all adapters in a module, by the path of the adapted model and the adapter's name."""
    return {
        f"{path}.{name}": plain_config(config)
        for path, configs in adapted_models(module)
        for name, config in configs.items()
    }
