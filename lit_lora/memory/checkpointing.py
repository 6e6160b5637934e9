"""Gradient checkpointing of all or some blocks of a diffusers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_lora.errors import UserError

_NAMES_SHOWN = 40


def enable_gradient_checkpointing(model: nn.Module, which: bool | Sequence[str]) -> None:
    """Make blocks save only their inputs and recompute their activations in the backward pass (Chen et al., 2016).

    The unit of recomputation is diffusers' own: one ResNet or transformer block.

    Args:
        model: A diffusers model, with or without an adapter.
        which: True for all blocks, False for none, or glob patterns of the names of blocks, such as ``down_blocks.0``,
            ``up_blocks.*`` or ``transformer_blocks.1?``; a pattern also covers everything inside a block.

    Raises:
        UserError: If the model does not support checkpointing, or a pattern matches none of its blocks.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not getattr(base, "_supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(base).__name__} does not support gradient checkpointing; set gradient_checkpointing to false"
        )
    if isinstance(which, str):
        raise UserError(
            f"gradient_checkpointing={which!r} is neither true, false nor a list of patterns; write ['{which}']"
        )
    if which is False:
        base.disable_gradient_checkpointing()
    elif which is True:
        base.enable_gradient_checkpointing()
    else:
        base.enable_gradient_checkpointing(_only(_chosen(base, which)))


def _chosen(base: nn.Module, patterns: Sequence[str]) -> set[nn.Module]:
    """The modules that a pattern matches, and all modules inside them."""
    blocks = dict(_blocks(base))
    chosen: set[nn.Module] = set()
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in blocks):
            names = _outermost(blocks)
            shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
            raise UserError(
                f"gradient_checkpointing: {pattern!r} matches no block of {type(base).__name__}; it has {shown}, and blocks "
                f"inside them. Patterns are matched against whole names: 'down_blocks.*', not 'down'."
            )
        chosen |= {module for name, module in base.named_modules() if _matches(name, pattern)}
    return chosen


def _only(chosen: set[nn.Module]) -> Callable[..., Any]:
    """The function that diffusers calls instead of a block, which checkpoints the chosen blocks."""

    def call(block: Any, *args: Any) -> Any:
        # Most models of diffusers pass the block, some pass a method of it.
        if getattr(block, "__self__", block) in chosen:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    return call


def _blocks(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The units of recomputation: modules with diffusers' flag, and those in lists directly below one."""
    for name, module in base.named_modules():
        if not hasattr(module, "gradient_checkpointing"):
            continue
        if name:
            yield name, module
        for list_name, children in module.named_children():
            if isinstance(children, nn.ModuleList):
                for number, child in children.named_children():
                    yield ".".join(filter(None, (name, list_name, number))), child


def _outermost(names: dict[str, nn.Module]) -> list[str]:
    return [name for name in names if not any(parent in names for parent in _parents(name))]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern matches the name or the name of a module around it."""
    return any(fnmatchcase(candidate, pattern) for candidate in (name, *_parents(name)))
