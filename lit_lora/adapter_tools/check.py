"""Checks an adapter against a base of which only configs are read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import nn

from lit_lora.adapter_tools.base_model import BaseModel
from lit_lora.adapter_tools.merge_base import check_base
from lit_lora.adapter_tools.plain_lora import beyond_lora, lora_layers
from lit_lora.adapters import ADAPTER_NAME
from lit_lora.adapters.bounds import check_bounds
from lit_lora.adapters.names import PREFIX, layer_of
from lit_lora.errors import UserError
from lit_lora.formats import AdapterFiles
from lit_lora.formats.find import families_of_layers
from lit_lora.formats.text_encoders import for_encoder
from lit_lora.visible import visible


@dataclass(frozen=True)
class CheckedPart:
    """A part of an adapter.

    Args:
        name: Name of the part, or ``new tokens``.
        model: Class of the base's model.
        tensors: Number of the adapter's tensors.
        problems: What is wrong; empty if it fits.
        unchecked: Why only the names of layers were compared; empty if shapes were too.
    """

    name: str
    model: str
    tensors: int
    problems: list[str]
    unchecked: str = ""


def check(adapter: AdapterFiles, path: object, base: BaseModel) -> list[CheckedPart]:
    """Check that every tensor of an adapter belongs to a layer of the base, with the right shape and a rank that it can use.

    New tokens are checked against each text encoder that they are for.

    Args:
        adapter: Adapter with finite values, which reading has checked.
        path: Where it was read from, for errors.
        base: Base; its models are built without weights.

    Raises:
        UserError: If the adapter is of another family, or the base lacks a model that the adapter changes.
    """
    check_base(adapter, path, base)
    checked = []
    for name, part in adapter.parts.items():
        model = base.shapes(base.part(name))
        kind = type(model).__name__
        files = part if name == "denoiser" else for_encoder(part, model)
        problems, unchecked = [*_rank_problems(files, path), *_layer_problems(files, model)], ""
        try:
            problems += _problems(files, model) if not problems else []
        except _NeedsWeightsError:
            problems += _unknown(files, model)
            unchecked = (
                f"PEFT makes {part.config.get('peft_type')} of the base's weights, so that shapes were not compared"
            )
        checked.append(CheckedPart(name, kind, len(part.state), problems, unchecked))
    return [*checked, *_checked_tokens(adapter, base)]


def _checked_tokens(adapter: AdapterFiles, base: BaseModel) -> Iterator[CheckedPart]:
    """The new tokens of each text encoder, whose vectors must be as wide as its own."""
    for name in dict.fromkeys(name for rows in adapter.new_tokens.values() for name in rows):
        model: Any = base.shapes(base.part(name))
        width = model.get_input_embeddings().weight.shape[1]
        widths = {token: rows[name].shape[1] for token, rows in adapter.new_tokens.items()}
        problems = [
            f"the embeddings of {token} have {found} values, and the base needs {width}"
            for token, found in widths.items()
            if found != width
        ]
        yield CheckedPart("new tokens", type(model).__name__, len(widths), problems)


def _rank_problems(part: AdapterFiles, path: object) -> Iterator[str]:
    """Ranks that exceed what a layer can use."""
    alone = AdapterFiles(part.state, part.config)
    if beyond_lora(alone):
        return
    for layer, one in lora_layers(alone, path)["denoiser"].items():
        if one.rank > one.most:
            yield f"{layer} has rank {one.rank}; a weight of the shape {one.weight_shape} has at most {one.most}"


class _NeedsWeightsError(Exception):
    """PEFT cannot make the adapter in a model without weights."""


def _layer_problems(part: AdapterFiles, model: nn.Module) -> Iterator[str]:
    """An adapter of which the model has no layer at all."""
    layers = {layer for key in part.state if (layer := layer_of(key, part.config))}
    if layers and not layers & {name for name, _ in model.named_modules()}:
        kinds = " or ".join(kind.__name__ for kind in families_of_layers(part))
        yield f"the base has none of its {len(layers)} layers, such as {visible(min(layers), 160)}" + (
            f": they are those of {kinds}" if kinds else ""
        )


def _unknown(part: AdapterFiles, model: nn.Module) -> Iterator[str]:
    """Tensors in no layer of the model, by their names alone."""
    names = {"", *(name for name, _ in model.named_modules())}
    if unknown := [key for key in part.state if layer_of(key, part.config) not in names]:
        yield f"{len(unknown)} of {len(part.state)} tensors belong to no layer of this base, such as {_shown(unknown)}"


def _problems(part: AdapterFiles, model: nn.Module) -> Iterator[str]:
    """Differences between the tensors and those that PEFT makes of the config in this model."""
    try:
        kind = PeftConfig.from_peft_type(**{**part.config, "inference_mode": True})
        check_bounds(kind, model)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice for training
            adapted = PeftModel(model, kind, ADAPTER_NAME)
            expected = get_peft_model_state_dict(adapted, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        if re.search(r"\bmeta[ _]", str(error), re.IGNORECASE):  # of torch: operators on tensors without values
            raise _NeedsWeightsError from error
        yield " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        return
    if unknown := part.state.keys() - expected.keys():
        yield f"{len(unknown)} of {len(part.state)} tensors belong to no layer of this base, such as {_shown(unknown)}"
    if missing := expected.keys() - part.state.keys():
        yield f"{len(missing)} tensors are missing that the adapter's config asks for, such as {_shown(missing)}"
    for key in sorted(part.state.keys() & expected.keys()):
        found, wanted = tuple(part.state[key].shape), tuple(expected[key].shape)
        if found != wanted:
            yield f"{_shown([key])} has the shape {found}, and the base needs {wanted}"


def _shown(keys: Collection[str]) -> str:
    return visible(min(keys).removeprefix(PREFIX), 160)


def raise_problems(checked: list[CheckedPart], path: object, base: BaseModel) -> None:
    """Report all problems.

    Raises:
        UserError: If there are any.
    """
    lines = [f"{part.name}: {problem}" for part in checked for problem in part.problems]
    if lines:
        shown = lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])
        raise UserError(
            f"the adapter {path} does not fit {base.path}:\n  "
            + "\n  ".join(shown)
            + "\nUse the base that it was trained on."
        )
