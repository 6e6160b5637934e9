"""Extracts an adapter from the difference of two models, layer by layer from disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.adapter_tools.base_model import CONFIG, BaseModel
from lit_lora.adapter_tools.budget import Budget, Spectrum
from lit_lora.adapter_tools.changed_parts import other_changes, trained_scheduler
from lit_lora.adapter_tools.lora_layer import LoraLayer, narrowed
from lit_lora.adapter_tools.plain_lora import Layers, in_parts, patterns
from lit_lora.adapter_tools.resize import Measure, resize
from lit_lora.adapter_tools.weight_stream import Shapes, shapes_in
from lit_lora.adapters import check_finite
from lit_lora.errors import UserError, check_whole
from lit_lora.formats import AdapterFiles
from lit_lora.formats.lora import lora_config
from lit_lora.tensor_reader import TensorReader
from lit_lora.visible import visible

_EXACT = 512
"""Smaller side of a matrix up to which its decomposition is exact; it takes less than a second then."""
_OVERSAMPLED = 16
"""Further components of the randomized decomposition, which make the wanted ones accurate."""
_ITERATIONS = 4
"""Power iterations of the randomized decomposition: differences of weights have singular values that fall slowly."""


class ModelWeights:
    """The weights of one model on disk.

    Args:
        path: Pipeline folder, of which the denoiser is taken; folder of a model; or safetensors file.
        variant: Variant of the weight files; defaults to none.

    Raises:
        UserError: If there are no weights, or they are damaged.
    """

    def __init__(self, path: str, variant: str | None = None) -> None:
        self.path = path
        self.model: BaseModel | None
        if Path(path).suffix == ".safetensors":
            folder = Path(path).parent
            files, self.part = [Path(path)], ""
            self.model = BaseModel(str(folder)) if (folder / CONFIG).is_file() else None
        else:
            self.model = BaseModel(path, weights=True, variant=variant)
            self.part = self.model.part("denoiser")
            files = self.model.weight_files(self.part)
        held = shapes_in(files)
        self._readers = {file: TensorReader(file) for file in files}
        self.files = {name: file for file, names in held.items() for name in names}
        self.shapes: Shapes = {name: shape for names in held.values() for name, shape in names.items()}

    def read_finite(self, name: str) -> Tensor:
        """One weight.

        Raises:
            UserError: If a value is NaN or Inf.
        """
        weight = self._readers[self.files[name]].tensor(name)
        check_finite({name: weight}, f"model {self.path}", "a difference from them means nothing: name another model")
        return weight


@dataclass(frozen=True)
class Extracted:
    """An adapter that was extracted.

    Args:
        adapter: The adapter.
        errors: Relative error of each layer: the norm of what the adapter lacks as a share of the norm of the difference.
        ranks: Rank of each layer.
        left_out: Names of changed weights that an adapter of layers cannot hold, such as norms and biases.
        unchanged: Number of layers that are equal in both models.
        other_parts: What is known of the pipelines' other parts that are not equal, by part.
    """

    adapter: AdapterFiles
    errors: dict[str, float]
    ranks: dict[str, int]
    left_out: list[str] = field(default_factory=list)
    unchanged: int = 0
    other_parts: dict[str, str] = field(default_factory=dict)


def extract(tuned: ModelWeights, base: ModelWeights, budget: Budget, max_rank: int, measure: Measure) -> Extracted:
    """Approximate the difference of a fine-tuned model and its base by a LoRA.

    The adapter says which scheduler it needs if the fine-tuned pipeline was trained for another one, as of v-prediction.

    Each difference of the weights of a Linear or Conv2d layer is decomposed by itself: exactly if its smaller side is at most
    512, otherwise by randomized subspace iteration (Halko, Martinsson and Tropp, 2011) with a fixed seed.

    Args:
        tuned: Fine-tuned model.
        base: Model that it was made of.
        budget: Rank of each layer, share of its energy, or size of the file.
        max_rank: Maximum rank for an energy share or a size.
        measure: Size of the file for an adapter, for a budget of bytes.

    Raises:
        UserError: If the models differ in more than their values, or in nothing, or hold NaN or Inf; or the budget is too
            small, or a rank above the size of every layer.
    """
    check_whole(1, max_rank=max_rank)
    most = budget.rank or max_rank
    model, shapes_of = _described(tuned, base)
    _check_names(tuned, base, model.state_dict())
    layers: Layers = {}
    errors: dict[str, float] = {}
    left_out, unchanged = [], 0
    adaptable = {f"{name}.weight": name for name, layer in model.named_modules() if _is_adaptable(layer)}
    _check_rank(budget.rank, {name: tuned.shapes[name] for name in adaptable if name in tuned.shapes}, base)
    for name in tuned.shapes:
        before, after = base.read_finite(name), tuned.read_finite(name)
        if name not in adaptable:
            left_out += [] if torch.equal(before.double(), after.double()) else [name]
            continue
        difference = after.float() - before.float()
        total = float(difference.double().square().sum())
        if total == 0:
            unchanged += 1
            continue
        layer, energies = _approximation(name, difference, most, after.dtype)
        spectrum = Spectrum(energies, total, 1, layer.bytes_per_step)
        count = layer.rank if budget.size else budget.components({name: spectrum}, _no_size)[name]
        layers[adaptable[name]] = _first(layer, count)
        errors[adaptable[name]] = _error(spectrum.kept(count))
    if not layers:
        raise UserError(
            f"{tuned.path} and {base.path} have equal weights in all layers that an adapter can change; name two other models"
        )
    adapter = _files(layers, shapes_of, base, trained_scheduler(tuned.model, base.model))
    if budget.size:
        resized = resize(adapter, tuned.path, budget, measure)
        adapter = resized.adapter
        errors = {name: _error((1 - errors[name] ** 2) * one.kept) for name, one in resized.layers.items()}
        ranks = {name: one.after for name, one in resized.layers.items()}
    else:
        ranks = {name: layer.rank for name, layer in layers.items()}
    return Extracted(adapter, errors, ranks, left_out, unchanged, other_changes(tuned.model, base.model))


def _described(tuned: ModelWeights, base: ModelWeights) -> tuple[nn.Module, BaseModel]:
    """The layers of the model, from the config of one of both."""
    for one in (base, tuned):
        if one.model is not None:
            return one.model.shapes(one.part), one.model
    raise UserError(
        f"neither {base.path} nor {tuned.path} has a {CONFIG} beside it, which tells the layers; name the folder of a model or a "
        f"pipeline that diffusers' save_pretrained wrote for one of them"
    )


def _check_names(tuned: ModelWeights, base: ModelWeights, state: dict[str, Any]) -> None:
    """Refuse models that differ in names or shapes."""
    for one in (base, tuned):
        if unknown := sorted(one.shapes.keys() - state.keys()):
            raise UserError(
                f"{one.path} has {len(unknown)} weights that the model does not have, such as {visible(unknown[0], 120)}; files "
                f"of other programs have other names: load them with diffusers' from_single_file and save_pretrained first"
            )
    if missing := sorted(tuned.shapes.keys() ^ base.shapes.keys()):
        raise UserError(
            f"{len(missing)} weights are only in one of {tuned.path} and {base.path}, such as {visible(missing[0], 120)}; name a "
            f"fine-tuned model and the base that it was made of"
        )
    for name, shape in tuned.shapes.items():
        if shape != base.shapes[name]:
            raise UserError(
                f"{visible(name, 120)} has the shape {shape} in {tuned.path} and {base.shapes[name]} in {base.path}; name a "
                f"fine-tuned model and the base that it was made of"
            )


def _check_rank(rank: int | None, shapes: Shapes, base: ModelWeights) -> None:
    """Refuse a rank that no layer can have."""
    name, most = max(((name, min(shape[0], math.prod(shape[1:]))) for name, shape in shapes.items()), key=itemgetter(1))
    if rank is not None and rank > most:
        raise UserError(
            f"rank={rank} is above {most}, the highest rank that a layer of {base.path} can have ({name} of the shape "
            f"{tuple(shapes[name])}); give at most {most}"
        )


def _is_adaptable(layer: nn.Module) -> bool:
    """Whether PEFT's LoRA can change all of the layer's weight."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _approximation(name: str, difference: Tensor, rank: int, dtype: torch.dtype) -> tuple[LoraLayer, Tensor]:
    """The best LoRA layer of a rank, and its components' energies in float64."""
    matrix = difference.flatten(1)
    smaller = min(matrix.shape)
    if smaller <= _EXACT:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, columns = torch.svd_lowrank(matrix, min(rank + _OVERSAMPLED, smaller), niter=_ITERATIONS)
        right = columns.mT
    rank = min(rank, smaller)
    root = values[:rank].sqrt()
    kernel = difference.shape[2:]
    down = (root[:, None] * right[:rank]).reshape(rank, *difference.shape[1:])
    up = (left[:, :rank] * root).reshape(len(matrix), rank, *[1] * len(kernel))
    down, up = narrowed(down, dtype, f"lora_A of {name}"), narrowed(up, dtype, f"lora_B of {name}")
    return LoraLayer(down, up, float(rank)), values[:rank].double().square()


def _first(layer: LoraLayer, count: int) -> LoraLayer:
    """The layer with its first components."""
    return replace(layer, down=layer.down[:count].contiguous(), up=layer.up[:, :count].contiguous(), alpha=float(count))


def _error(kept: float) -> float:
    return math.sqrt(max(0.0, 1 - kept))


def _no_size(components: object) -> int:
    raise AssertionError("only a budget of bytes measures files")


def _files(layers: Layers, described: BaseModel, base: ModelWeights, metadata: dict[str, str]) -> AdapterFiles:
    """The adapter's files."""
    family = described.family
    naming: dict[str, Any] = {}
    if family is not None:
        of_base = family(described.path)
        of_base.read_configs()
        naming = dict(of_base.naming_config)
    tensors = {name: one.tensors() for name, one in layers.items()}
    usual, pattern = patterns({name: one.rank for name, one in layers.items()})
    config = lora_config(tensors, {}, None if family is None else family.denoiser_class) | {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "base_model_name_or_path": base.path,
    }
    return in_parts(AdapterFiles({}, {}, metadata, family, denoiser_config=naming), {"denoiser": (layers, config)})
