"""The adapter: how it is put into a model, which keys are its own, and how it becomes files."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_lora.errors import UserError
from lit_lora.gather import of_first, whole
from lit_lora.storage.frozen_layer import frozen_layers

ADAPTER_NAME = "default"

_BLOCK_BY_BLOCK = frozenset(
    {PeftType.LORA, PeftType.LOHA, PeftType.LOKR, PeftType.OFT, PeftType.IA3, PeftType.HRA, PeftType.VERA}
    | {PeftType.FOURIERFT, PeftType.ADALORA}
)
"""Methods whose adapters were compared with those that were put into a model with its weights."""

_NOT_PART_OF_THE_FUNCTION = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
    | {"init_lora_weights", "init_weights", "runtime_config", "task_type", "loftq_config", "target_modules"}
)
"""Fields of a PEFT config that two interchangeable adapters may differ in."""


def inject(model: nn.Module, config: PeftConfig, default_targets: tuple[str, ...]) -> PeftModel:
    """Freeze ``model`` and put the adapter into it.

    Args:
        model: The model to adapt; changed in place.
        config: Any PEFT config whose method sits in the layers. Without ``target_modules`` it takes the defaults.
        default_targets: The layers that a family adapts where the config names none.

    Raises:
        UserError: The targets match no layer or layers that the method cannot adapt; the method needs a model of another
            kind; its initialisation would change the base; or biases are trained in a base that is not float32.
    """
    _check_method(config, model)
    if getattr(config, "target_modules", None) is None and hasattr(config, "target_modules"):
        config.target_modules = set(default_targets)
    _warn_of_small_alpha(config)
    model.requires_grad_(False)
    try:
        adapted = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        raise UserError(
            f"the adapter {type(config).__name__} does not fit {type(model).__name__}: {error}\n"
            f"target_modules is {_shown(getattr(config, 'target_modules', None))}; names that occur in this model are "
            f"{', '.join(_layer_names(model))}"
        ) from error
    trained = trainable_parameters(adapted)
    if not trained:
        raise UserError(f"the adapter {type(config).__name__} has no trainable parameter: check its target_modules")
    for parameter in trained:  # modules_to_save and biases come in the base's dtype
        parameter.data = parameter.data.float()
    return adapted


def same_adapter(module: nn.Module) -> None:
    """Give the adapter the first process's values; a collective call where there are several."""
    own = adapter_keys(module)
    state = {key: value for key, value in module.state_dict().items() if key in own and not _is_nan(value)}
    for key, value in of_first(state).items():
        state[key].copy_(value)


def check_block_by_block(config: PeftConfig) -> None:
    """Make sure that an adapter can be put in before the base's weights are there.

    Raises:
        UserError: Its method is not known to begin without them, or shares trained tensors between layers.
    """
    if config.peft_type not in _BLOCK_BY_BLOCK:
        raise UserError(
            f"{type(config).__name__} is not known to train where the weights are shared out while they are read; use strategy "
            f"ddp, or one of {', '.join(sorted(kind.value for kind in _BLOCK_BY_BLOCK))}"
        )


def complete_adapter(module: nn.Module, config: PeftConfig) -> None:
    """Take from the base what the adapter begins with, where it was put in before the base's weights, which were nan, came.

    Args:
        module: All frozen weights in it are there by now.
        config: The adapter's.

    Raises:
        UserError: It is not known what the adapter's method takes.
    """
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_magnitude_vector:
                if _is_nan(layer.lora_magnitude_vector[name].weight):
                    layer.lora_variant[name].init(layer, name, config=config)
                    magnitude = layer.lora_magnitude_vector[name].weight
                    magnitude.data = magnitude.data.float()
        elif isinstance(layer, ModulesToSaveWrapper):
            for name, copied in layer.modules_to_save.items():
                if any(map(_is_nan, copied.parameters())):
                    _check_trained_copy(path, layer.original_module)
                    layer.modules_to_save[name] = copy.deepcopy(layer.original_module).float().requires_grad_(True)
    own = adapter_keys(module)
    for name, value in module.state_dict(keep_vars=True).items():
        if name in own and _is_nan(value):
            raise UserError(
                f"the adapter begins with values that it takes from the base's weights ({name}), which is not possible where "
                f"the weights are shared out while they are read; use strategy ddp"
            )


def adapter_keys(module: nn.Module) -> set[str]:
    """The keys of ``module.state_dict()`` that are the adapter's.

    These are the trainable parameters, and in every layer that PEFT has put in, whatever the layer itself declares
    as its adapter's (AdaLoRA's ``ranknum`` and the frozen halves of some methods are not trainable, yet needed).
    """
    keys = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for path, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            own = {*layer.adapter_layer_names, *layer.other_param_names}
            prefix = f"{path}." if path else ""
            keys |= {prefix + key for key in layer.state_dict() if key.split(".", 1)[0] in own}
    return keys


def keep_only_adapter(state_dict: dict[str, Any], keys: set[str]) -> None:
    """Drop every entry that is not the adapter's, in place."""
    for key in [key for key in state_dict if key not in keys]:
        del state_dict[key]


def check_adapter_state(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Make sure that a checkpoint's weights are those of this module's adapter.

    Raises:
        UserError: Keys are missing or left over, or shapes differ.
    """
    here, own = module.state_dict(keep_vars=True), adapter_keys(module)
    # Of a parameter that DeepSpeed has shared out, the shape says nothing.
    expected = {key: tuple(getattr(value, "ds_shape", value.shape)) for key, value in here.items() if key in own}
    missing = sorted(expected.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - here.keys())
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} in the checkpoint, {shape} here"
        for key, shape in expected.items()
        if key in state_dict and tuple(state_dict[key].shape) != shape
    ]
    problems = [
        f"{len(found)} {what}, the first: {found[0]}"
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
            "Resume with the adapter settings that the checkpoint was made with, or start without ckpt_path."
        )


def check_adapter_config(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Make sure that a checkpoint's adapter computes the same function of its weights as this one.

    Raises:
        UserError: A setting such as ``lora_alpha`` differs.
    """
    changed = [
        f"{name} is {here[name]!r}, in the checkpoint {saved[name]!r}"
        for name in sorted(here.keys() & saved.keys() - _NOT_PART_OF_THE_FUNCTION)
        if here[name] != saved[name]
    ]
    if changed:
        raise UserError(
            "the checkpoint holds another adapter: " + "; ".join(changed) + ". "
            "Resume with the adapter settings that the checkpoint was made with, or start without ckpt_path."
        )


def plain_config(config: PeftConfig) -> dict[str, Any]:
    """The config as JSON has it: no sets, enums or classes; the same for the same config, also in another process."""
    # PEFT lists a set in the set's order, which differs from process to process.
    sets = {name: sorted(value) for name, value in vars(config).items() if isinstance(value, set)}
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict() | sets, default=_plain))
    return plain


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names without the adapter's name, whole and on the CPU; a collective call."""
    state = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), ADAPTER_NAME, save_embedding_layers=False
    )
    return {key: whole(value).detach().cpu().contiguous() for key, value in state.items()}


def save_peft_files(state: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, which ``PeftModel.from_pretrained`` reads.

    Args:
        state: What :func:`adapter_state` gave.
        config: What :func:`plain_config` gave, with the base's name.
        folder: An existing folder.
    """
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def sort_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file in order: they are written in any, so the same adapter gives different bytes."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "the tensors begin where they began"
        opened.seek(8)
        opened.write(text.ljust(size))


def is_lora(config: PeftConfig) -> bool:
    """Whether diffusers' LoRA loader can read the adapter (LoRA and DoRA, not AdaLoRA or LoHa)."""
    return type(config) is LoraConfig


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What is trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _is_nan(value: Tensor) -> bool:
    """Whether there is a nan, in a tensor that is not shared out over processes."""
    return value.is_floating_point() and not isinstance(value, DTensor) and bool(value.isnan().any())


def _check_method(config: PeftConfig, model: nn.Module) -> None:
    """Refuse what cannot be trained here, or not so that the adapter's files alone give the trained model."""
    if config.is_prompt_learning:
        raise UserError(
            f"{type(config).__name__} adapts prompts, not layers; use one of LoRA's kind, as peft.LoraConfig"
        )
    initialisation = getattr(config, "init_lora_weights", True)
    if initialisation not in (True, False, "gaussian", "orthogonal"):
        raise UserError(
            f"init_lora_weights={initialisation!r} changes the base's weights or needs data, so that the adapter's files alone "
            f"would not give the trained model; use true, gaussian or orthogonal"
        )
    bias = getattr(config, "bias", "none")
    if bias != "none" and any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise UserError(
            f"bias={bias!r} trains weights of the base, which needs base_dtype float32; or leave bias at 'none'"
        )
    _check_trained_copies(getattr(config, "modules_to_save", None) or (), model)


def _check_trained_copies(names: Sequence[str], model: nn.Module) -> None:
    """Refuse to train copies of layers that are not stored densely."""
    for name in names:
        for path, layer in model.named_modules():
            if path.endswith(name):
                _check_trained_copy(path, layer)


def _check_trained_copy(path: str, layer: nn.Module) -> None:
    quantised = [inner for inner in frozen_layers(layer) if not inner.is_dense]
    if quantised:
        raise UserError(
            f"modules_to_save would train a copy of {path}, which is stored as {type(quantised[0].storage).__name__} and has "
            f"no gradient; keep it dense with model.base's skip: ['*{path.rpartition('.')[2]}'], or adapt it with target_modules"
        )


def _warn_of_small_alpha(config: PeftConfig) -> None:
    rank, alpha = getattr(config, "r", None), getattr(config, "lora_alpha", None)
    if isinstance(rank, int) and isinstance(alpha, int | float) and alpha * 4 <= rank:
        warnings.warn(
            f"lora_alpha={alpha} is far below r={rank}: the update is scaled by {alpha / rank:.3g}, so the usual learning "
            f"rates train it very slowly. Set lora_alpha={rank}, or raise the learning rate by about {rank / alpha:.0f}.",
            stacklevel=2,
        )


def _layer_names(model: nn.Module) -> list[str]:
    layers = (nn.Linear, nn.Conv2d)
    names = {name for name, layer in model.named_modules() if isinstance(layer, layers)}
    last = {name.rsplit(".", 1)[-1] for name in names} - {str(i) for i in range(100)}
    return sorted(last)[:24]


def _shown(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, set) else targets


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "value", None) or repr(value)
