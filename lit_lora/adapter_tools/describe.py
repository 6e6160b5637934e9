"""What an adapter is: method, base, ranks, sizes and norms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_lora.adapter_tools.low_rank import one_thread
from lit_lora.adapter_tools.plain_lora import beyond_lora, lora_layers
from lit_lora.adapter_tools.product_layer import product_layers
from lit_lora.adapters.names import layer_of
from lit_lora.formats import AdapterFiles
from lit_lora.formats.hadamard_kronecker import METHODS
from lit_lora.formats.textual_inversion import TEXTUAL_INVERSION

SHARED = "shared by all layers"
"""In place of a layer's name: tensors that belong to no single layer, as VeRA's projections."""


@dataclass(frozen=True)
class LayerFacts:
    """One adapted layer.

    Args:
        part: Name of its model in the pipeline; ``denoiser`` for the denoiser.
        name: Name of the layer.
        parameters: Number of the adapter's values in it.
        rank: Rank; None for methods beside LoRA, DoRA, LoHa and LoKr, as all that follows.
        alpha: PEFT's alpha.
        scale: Factor of the update.
        norm: Frobenius norm of the scaled update.
    """

    part: str
    name: str
    parameters: int
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    norm: float | None = None


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter is.

    Args:
        method: Name of the method, such as ``LoRA``, ``DoRA, rsLoRA`` or ``LOHA``; ``textual inversion`` for new tokens alone.
        family: Name of the model family; None if it is not known.
        base: Name of the base; None if the file does not tell it.
        parameters: Number of all values, those of new tokens among them.
        dtypes: Numbers of values by dtype.
        layers: The adapted layers.
        metadata: Facts about the training.
        new_tokens: Number of vectors of each new token.
    """

    method: str
    family: str | None
    base: str | None
    parameters: int
    dtypes: dict[str, int]
    layers: list[LayerFacts]
    metadata: dict[str, str]
    new_tokens: dict[str, int]


@one_thread()
def describe(adapter: AdapterFiles, path: str | Path) -> AdapterFacts:
    """Describe an adapter.

    Args:
        adapter: Adapter.
        path: Where it was read from, for errors.

    Raises:
        UserError: If the tensors of a LoRA are incomplete.
    """
    dtypes: Counter[str] = Counter()
    for tensors in (*(part.state for part in adapter.parts.values()), *adapter.new_tokens.values()):
        for tensor in tensors.values():
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return AdapterFacts(
        method=method_name(adapter),
        family=None if adapter.family is None else adapter.family.__name__,
        base=adapter.base,
        parameters=dtypes.total(),
        dtypes=dict(dtypes.most_common()),
        layers=list(_other_layers(adapter) if beyond_lora(adapter) else _lora_layers(adapter, path))
        if adapter.parts
        else [],
        metadata=dict(adapter.metadata),
        new_tokens={token: len(next(iter(rows.values()))) for token, rows in adapter.new_tokens.items()},
    )


def method_name(adapter: AdapterFiles) -> str:
    """The method of an adapter, as its users call it."""
    names: list[str] = []
    for part in adapter.parts.values():
        kind = str(part.config.get("peft_type"))
        plain = "DoRA" if part.config.get("use_dora") else "LoRA"
        names.append(plain if kind == "LORA" else kind)
        names += ["rsLoRA"] if kind == "LORA" and part.config.get("use_rslora") else []
    return ", ".join(dict.fromkeys(names)) or TEXTUAL_INVERSION


def _lora_layers(adapter: AdapterFiles, path: str | Path) -> Iterator[LayerFacts]:
    for part, layers in lora_layers(adapter, path).items():
        for name, one in layers.items():
            count = sum(tensor.numel() for tensor in one.tensors().values())
            yield LayerFacts(part, name, count, one.rank, one.alpha, one.scale, one.update().norm())


def _other_layers(adapter: AdapterFiles) -> Iterator[LayerFacts]:
    for part, files in adapter.parts.items():
        if files.config.get("peft_type") in METHODS and not files.config.get("modules_to_save"):
            for name, one in product_layers(files):
                count = sum(tensor.numel() for tensor in one.tensors.values())
                yield LayerFacts(part, name, count, one.rank, one.alpha, one.scale, one.norm())
            continue
        found: dict[str, list[Tensor]] = {}
        for key, tensor in files.state.items():
            layer = layer_of(key, files.config) or SHARED
            found.setdefault(layer, []).append(tensor)
        for name, tensors in found.items():
            yield LayerFacts(part, name, sum(tensor.numel() for tensor in tensors))
