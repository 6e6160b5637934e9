"""Presets of an adapter's ``target_modules``: kinds of layers, found by the structure of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_lora.errors import UserError

PRESETS: Mapping[str, str] = {
    "attention": "the projections of attention layers",
    "mlp": "the Linear layers of feed-forward networks beside attention",
    "all-linear": "all Linear layers except the output embedding of a language model",
    "conv": "all convolutions",
}
"""The presets, each with the layers that it stands for; ``+`` joins them, as in ``attention+mlp``."""

_LINEAR = (nn.Linear, Conv1D)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_ATTENTION_NAME = re.compile(r"(?:\w+_)?(?:attn\d*|attention)")
"""Names of attention layers, such as ``attn1`` and ``self_attn``; not ``attentions``, the list of a UNet's transformers."""
_ATTENTION_CLASS = re.compile(r".*Attention(?:V?\d+)?")
_MLP_NAME = re.compile(r"(?:\w+_)?(?:ff|ffn|mlp)(?:_\w+)?\d*|feed_?forward\w*|DenseReluDense|intermediate")
"""Names of feed-forward networks, such as ``ff``, ``ff_context``, ``img_mlp`` and BERT's ``intermediate``."""
_MLP_CLASS = re.compile(r".*(?:FeedForward|FFN|MLP|Mlp)")
_BESIDE_ATTENTION = re.compile(r"fc[12]|linear[12]|lin[12]|proj_mlp|proj_out|output")
"""Names of feed-forward layers that are children of the block itself, as in OPT, BERT and parallel blocks."""


def is_preset(targets: object) -> bool:
    """Whether ``target_modules`` is a preset or several joined with ``+``."""
    return isinstance(targets, str) and all(part in PRESETS for part in targets.split("+"))


def described_presets() -> str:
    """The presets in one sentence, for errors."""
    return f"presets are {', '.join(PRESETS)}, joined with + as in attention+mlp"


def preset_targets(preset: str, model: nn.Module) -> set[str] | str:
    """``target_modules`` for PEFT: names of all layers that a preset stands for in this model.

    PEFT also takes a name for the end of longer names. Where that would match further layers, the result is a regular
    expression.

    Args:
        preset: One of :data:`PRESETS`, or several joined with ``+``.
        model: Model into which the adapter goes.

    Raises:
        UserError: If a part of the preset matches no layer.
    """
    found: set[str] = set()
    for part in preset.split("+"):
        names = {name for name, kinds in _layers(model) if part in kinds}
        if not names:
            raise UserError(
                f"target_modules: {preset!r} matches no layer of {type(model).__name__}: it has none of {PRESETS[part]}; list "
                f"names of layers. {described_presets().capitalize()}"
            )
        found |= names
    ends = tuple(f".{name}" for name in found)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in found):
        return "|".join(map(re.escape, sorted(found)))
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, Collection[str]]]:
    """Names of the layers that adapters can change, each with the presets that contain it."""
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "get_output_embeddings")]
    heads = [part.get_output_embeddings() for part in parts]
    seen: set[nn.Module] = set()  # PEFT knows a layer that is in two places by its first name
    for name, layer, role in _roles(model, "", ""):
        if layer in seen:
            continue
        seen.add(layer)
        if isinstance(layer, _CONV):
            yield name, ("conv",)
        elif isinstance(layer, nn.MultiheadAttention):
            yield name, ("attention",)
        elif isinstance(layer, _LINEAR):
            yield name, (role,) if any(layer is head for head in heads) else (role, "all-linear")


def _roles(module: nn.Module, prefix: str, role: str) -> Iterator[tuple[str, nn.Module, str]]:
    """All modules below a module by name, with the role that the nearest part with a role gives them: attention, mlp or none."""
    children = dict(module.named_children())
    is_block = role != "attention" and any(_is_attention(name, child) for name, child in children.items())
    for name, child in children.items():
        own = role
        if _is_attention(name, child):
            own = "attention"
        elif _is_mlp(name, child) or (is_block and _BESIDE_ATTENTION.fullmatch(name)):
            own = "mlp"
        yield prefix + name, child, own
        # torch's own attention reads the weights of its layers without calling them; PEFT adapts it as a whole.
        if not isinstance(child, nn.MultiheadAttention):
            yield from _roles(child, f"{prefix}{name}.", own)


def _is_attention(name: str, module: nn.Module) -> bool:
    return bool(_ATTENTION_NAME.fullmatch(name) or _ATTENTION_CLASS.fullmatch(type(module).__name__))


def _is_mlp(name: str, module: nn.Module) -> bool:
    return bool(_MLP_NAME.fullmatch(name) or _MLP_CLASS.fullmatch(type(module).__name__))
