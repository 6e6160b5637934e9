"""Injection of an adapter into a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from lit_lora.adapters.bounds import check_bounds, warn_of_idle_rank
from lit_lora.adapters.methods import is_rebased, method_of
from lit_lora.adapters.targets import described_presets, is_preset, preset_targets
from lit_lora.console import out_of_memory
from lit_lora.errors import UserError
from lit_lora.finite import damaged_base
from lit_lora.parameters import trainable_parameters
from lit_lora.quantization.frozen_layer import quantized_layers, weights_asked_for_again

ADAPTER_NAME = "default"

_FOR_LANGUAGE_MODELS = ("XLORA", "POLY", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "SHADOW")
"""PEFT's types that need token ids, hidden states of a language model or a task's number."""

_CALLBACK_OF = {
    "eva": "EvaInitialization",
    "corda": "CordaInitialization",
    "lora_ga": "LoraGaInitialization",
    "loftq": "LoftqInitialization",
}
"""Callbacks that initialize adapters from more than a loaded base, by PEFT's name of the initialization."""


def inject(model: nn.Module, config: PeftConfig, default_targets: tuple[str, ...]) -> PeftModel:
    """Freeze a model and inject an adapter into it.

    Args:
        model: Model to adapt; changed in place.
        config: PEFT config of a method that adapts layers. If its ``target_modules`` are a preset, they are set to the names
            of the layers that it stands for; if it has none, they are set to the defaults.
        default_targets: Layers to adapt if the config names none; a list of layers of that name is left out.

    Raises:
        UserError: If a name in the config matches no layer, or layers that the method cannot adapt; if the method does not
            adapt layers; if its initialization would change the base; if biases are trained in a base that is not float32; or
            if a rank exceeds the dimensions of a layer, or alpha is 0.
    """
    _check_method(config, model)
    targets = getattr(config, "target_modules", None)
    if is_preset(targets):
        config.target_modules = preset_targets(str(targets), model)
    _check_names(config, model)
    if targets is None and hasattr(config, "target_modules"):
        config.target_modules = _layers_not_lists(default_targets, model)
    if getattr(config, "feedforward_modules", ()) is None:  # IA3: PEFT only knows those of language models
        config.feedforward_modules = set()
    check_bounds(config, model)  # before any regular expression is matched, since it may never end
    _check_excluded(config, model)
    _check_alpha(config)
    model.requires_grad_(False)
    try:
        with warnings.catch_warnings(), weights_asked_for_again():
            warnings.filterwarnings("ignore", ".*did not match any targeted module")  # an error here
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
            adapted = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        # PiSSA, for one, cannot decompose NaN.
        if isinstance(error, RuntimeError) and (advice := damaged_base(model)):
            raise UserError(f"{type(model).__name__} cannot be adapted: {advice}") from error
        raise UserError(
            f"the adapter {type(config).__name__} does not fit {type(model).__name__}: {error}\n"
            f"target_modules is {_shown(getattr(config, 'target_modules', None))}; names that occur in this model are "
            f"{', '.join(_layer_names(model))}; {described_presets()}"
        ) from error
    _check_pattern_matches(config, adapted)
    _check_layer_numbers(config, adapted)
    warn_of_idle_rank(config, adapted)
    trained = trainable_parameters(adapted)
    if not trained:
        raise UserError(f"the adapter {type(config).__name__} has no trainable parameter: check its target_modules")
    for parameter in trained:  # modules_to_save and biases come in the base's dtype
        parameter.data = parameter.data.float()
    method_of(config).injected(adapted)
    return adapted


def _layers_not_lists(targets: Sequence[str], model: nn.Module) -> set[str]:
    """Targets for PEFT, with full names for one that is the end of a list's name too, such as ``to_out`` of two blocks."""
    named = dict(model.named_modules())
    found: set[str] = set()
    for target in targets:
        ends = [name for name in named if name == target or name.endswith(f".{target}")]
        layers = [name for name in ends if not isinstance(named[name], nn.ModuleList)]
        found.update([target] if len(layers) == len(ends) else layers)
    return found


def _check_method(config: PeftConfig, model: nn.Module) -> None:
    """Refuse configs that cannot be trained here, or whose files would not reproduce the trained model."""
    if config.peft_type in _FOR_LANGUAGE_MODELS:
        raise UserError(
            f"{type(config).__name__} needs a language model; use a method that adapts layers, such as peft.LoraConfig"
        )
    if config.is_prompt_learning:
        raise UserError(
            f"{type(config).__name__} adapts prompts, not layers; use a method that adapts layers, such as peft.LoraConfig"
        )
    initialisation = getattr(config, "init_lora_weights", True)
    if callback := _CALLBACK_OF.get(str(initialisation).lower()):
        raise UserError(
            f"init_lora_weights={initialisation!r} needs more than the base's weights; leave init_lora_weights out and add "
            f"{callback} to trainer.callbacks, which brings it"
        )
    if initialisation not in (True, False, "gaussian", "orthogonal", "mica") and not is_rebased(initialisation):
        raise UserError(
            f"init_lora_weights={initialisation!r} is not known here; use true, gaussian, orthogonal, pissa, pissa_niter_4, "
            f"olora or mica"
        )
    method_of(config).check(model, config)
    bias = getattr(config, "bias", "none")
    if bias != "none" and any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise UserError(
            f"bias={bias!r} trains weights of the base, which needs base_dtype float32; or leave bias at 'none'"
        )
    _check_trained_copies(getattr(config, "modules_to_save", None) or (), model)


def _check_names(config: PeftConfig, model: nn.Module) -> None:
    """Refuse names of layers that match nothing: PEFT only asks that one of them matches."""
    paths = [path for path, _ in model.named_modules()]
    for option in ("target_modules", "modules_to_save", "exclude_modules"):
        names = getattr(config, option, None)
        if isinstance(names, str):  # a regular expression: see _check_excluded; PEFT reports that no target matches
            continue
        for name in sorted({*(names or ())}):
            if not any(path == name or path.endswith(f".{name}") for path in paths):
                advice = (
                    f"write the preset without a list: {option}: {name}" if is_preset(name) else "correct or remove it"
                )
                raise UserError(
                    f"{option}: {name!r} matches no layer of {type(model).__name__}; {advice}. Names that occur in this model "
                    f"are {', '.join(_layer_names(model))}"
                )


def _check_excluded(config: PeftConfig, model: nn.Module) -> None:
    """Refuse a regular expression of ``exclude_modules`` that matches nothing; call it after :func:`check_bounds`."""
    names = getattr(config, "exclude_modules", None)
    if isinstance(names, str) and not any(re.fullmatch(names, path) for path, _ in model.named_modules()):
        raise UserError(f"exclude_modules: {names!r} matches no layer of {type(model).__name__}; correct or remove it")


def _check_pattern_matches(config: PeftConfig, model: PeftModel) -> None:
    """Refuse patterns for the rank or alpha of layers that are not adapted."""
    targets: list[str] = getattr(model.base_model, "targeted_module_names", [])
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option, None) or {}:
            # As PEFT compares them.
            if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in targets):
                raise UserError(
                    f"{option}: {pattern!r} matches none of the {len(targets)} adapted layers; correct or remove it"
                )


def _check_layer_numbers(config: PeftConfig, model: PeftModel) -> None:
    """Refuse numbers of blocks that are not there: PEFT only asks that one of them is."""
    numbers = getattr(config, "layers_to_transform", None)
    lists: Any = getattr(config, "layers_pattern", None) or []
    targets: list[str] = getattr(model.base_model, "targeted_module_names", [])
    # As PEFT compares them.
    patterns = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in ([lists] if isinstance(lists, str) else lists)]
    patterns = patterns or [r".*?\.[^.]*\.(\d+)\."]
    found = {int(match[1]) for path in targets for one in patterns if (match := re.match(one, path))}
    for number in [numbers] if isinstance(numbers, int) else numbers or ():
        if number not in found:
            raise UserError(
                f"layers_to_transform: {number} is the number of no block with an adapted layer; those are "
                f"{', '.join(map(str, sorted(found)))}"
            )


def _check_trained_copies(names: Sequence[str], model: nn.Module) -> None:
    """Refuse to train copies of quantized layers."""
    for name in names:
        for path, layer in model.named_modules():
            if path.endswith(name):
                check_trained_copy(path, layer)


def check_trained_copy(path: str, layer: nn.Module) -> None:
    """Refuse to train a copy of a quantized layer.

    Args:
        path: Name of the layer in the model.
        layer: Layer that ``modules_to_save`` names.

    Raises:
        UserError: If a weight in the layer is quantized, since it has no gradient.
    """
    quantised = quantized_layers(layer)
    if quantised:
        raise UserError(
            f"modules_to_save would train a copy of {path}, which has quantization="
            f"{type(quantised[0].quantization).__name__} and no gradient; keep it dense with model.quantization's skip: "
            f"['*{path.rpartition('.')[2]}'], or adapt it with target_modules"
        )


def _check_alpha(config: PeftConfig) -> None:
    """Refuse an alpha that scales updates and their gradients to zero, and warn of one that is far below the rank."""
    for name in ("lora_alpha", "alpha"):
        if getattr(config, name, None) == 0:
            raise UserError(f"{name}=0 scales the updates to zero, so that nothing would be trained; set it to r")
    if zeros := [key for key, alpha in (getattr(config, "alpha_pattern", None) or {}).items() if alpha == 0]:
        raise UserError(
            f"alpha_pattern[{zeros[0]!r}]=0 scales the updates of its layers to zero, so that they would not be trained; set it "
            f"to their rank, or adapt other layers"
        )
    rank, alpha = getattr(config, "r", None), getattr(config, "lora_alpha", None)
    if isinstance(rank, int) and isinstance(alpha, int | float) and abs(alpha) * 4 <= rank:
        warnings.warn(
            f"lora_alpha={alpha} is far below r={rank}: the update is scaled by {alpha / rank:.3g}, so the usual learning "
            f"rates train it very slowly. Set lora_alpha={rank}, or raise the learning rate by about "
            f"{rank / abs(alpha):.0f}.",
            stacklevel=2,
        )


def _layer_names(model: nn.Module) -> list[str]:
    layers = (nn.Linear, nn.Conv2d)
    names = {name for name, layer in model.named_modules() if isinstance(layer, layers)}
    last = {name.rsplit(".", 1)[-1] for name in names} - {str(i) for i in range(100)}
    return sorted(last)[:24]


def _shown(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, set) else targets
