"""How the processes of a run divide its weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lit_lora.distributed import LitLoraDeepSpeed, LitLoraFSDP
from lit_lora.families.loading import read_by_others
from lit_lora.families.parts import base_model
from lit_lora.module import LoraDiffusion
from lit_lora.parameters import trainable_parameters
from lit_lora.quantization.sharded_parts import sharded_parts

Sizes = dict[str, int]
"""Bytes by kind."""


@dataclass(frozen=True)
class Share:
    """What one process has beside, or instead of, full copies of everything; negative bytes are those that it lacks.

    Args:
        held: Bytes during the whole run; defaults to none.
        gathered: Bytes of other processes' shards while the denoiser computes; defaults to none.
        encoding: The same while the encoders compute, all of frozen weights; defaults to 0.
        backward: Bytes in the backward pass; defaults to none.
        stepped: Stand-ins for the shards that the optimizer steps; defaults to none, where it steps the trained parameters.
        keeps_gradients: Whether full gradients stay until the optimizer's step; defaults to True.
    """

    held: Sizes = field(default_factory=dict)
    gathered: Sizes = field(default_factory=dict)
    encoding: int = 0
    backward: Sizes = field(default_factory=dict)
    stepped: Sequence[nn.Parameter] | None = None
    keeps_gradients: bool = True


@dataclass(frozen=True)
class Processes:
    """Processes of which each has full copies of everything: one, or several with a strategy that is not known here.

    Args:
        count: Number of processes on all machines; defaults to 1.
        strategy: Name of the strategy; defaults to none.
    """

    count: int = 1
    strategy: str = ""

    shards = False
    """Whether a process holds less than full copies of what is trained."""

    @property
    def description(self) -> str:
        """What is planned, in two lines of fewer than 70 characters; empty for a single process without a strategy."""
        if self.count == 1 and not self.shards:
            return ""
        each = "the only process" if self.count == 1 else f"each of {self.count} processes"
        return f"{each}, {self.strategy}:\n{self._divided()}"

    def share(self, module: LoraDiffusion, cuda: bool) -> Share:
        """What one process holds.

        Args:
            module: Module with its parts loaded, from tensors with or without contents.
            cuda: Whether the run is on GPUs, so that tensors in host memory do not count.
        """
        return Share()

    def _divided(self) -> str:
        return "counted as full copies of all weights"


@dataclass(frozen=True)
class DDP(Processes):
    """Processes with full copies, which sum their gradients in buckets.

    Args:
        bucket_views: Whether the gradients are views of the buckets; defaults to False, as in torch.
    """

    bucket_views: bool = False

    def share(self, module: LoraDiffusion, cuda: bool) -> Share:
        return Share(held={} if self.bucket_views else {"gradients": _bytes(trainable_parameters(module))})

    def _divided(self) -> str:
        return "full copies" + (", and buckets of gradients" if not self.bucket_views else "")


@dataclass(frozen=True)
class FSDP2(Processes):
    """Processes with shards of the denoiser and of trained text encoders: see :class:`~lit_lora.distributed.LitLoraFSDP`.

    Args:
        sharing: Number of processes that share one copy; defaults to 1.
        offload: Whether shards, gradients and optimizer state are in host memory; defaults to False.
    """

    sharing: int = 1
    offload: bool = False

    shards = True

    def share(self, module: LoraDiffusion, cuda: bool) -> Share:
        family, away = module.family, self.offload and cuda
        models = [base_model(family.denoiser), *(base_model(family.encoders[one]) for one in family.trained_encoders)]
        units = [_units(models[0], family.block_classes), *(_units(model, ()) for model in models[1:])]
        parameters = [parameter for model in models for parameter in model.parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        held = {
            kind: (0 if away else sum(self._shard(one).numel() * one.itemsize for one in some)) - _bytes(some)
            for kind, some in _by_kind(parameters).items()
        }
        stepped = [nn.Parameter(self._shard(one).new_empty(0 if away else self._shard(one).shape)) for one in trained]
        gathered = max((_gathered(one, self.sharing) for one in units), key=lambda sizes: sum(sizes.values()))
        # The gradients of a unit, and a copy of them in the order in which they are sent.
        largest = max(unit.sizes["adapter"] for some in units for unit in some)
        return Share(held, gathered, 0, {"gradients": 2 * largest}, stepped, keeps_gradients=False)

    def _shard(self, parameter: Tensor) -> Tensor:
        """A tensor like the shard: ``fully_shard`` divides the first dimension, and the last shard is padded."""
        first, *others = parameter.shape or (1,)
        return parameter.new_empty(-(-first // self.sharing), *others)

    def _divided(self) -> str:
        if self.offload:
            return "shards of denoiser, gradients, optimizer state in host memory"
        return f"1/{self.sharing} of denoiser, gradients, optimizer state; the blocks in use"


@dataclass(frozen=True)
class Zero(Processes):
    """Processes with shards as DeepSpeed's ZeRO makes them: see :class:`~lit_lora.distributed.LitLoraDeepSpeed`.

    Args:
        options: The key ``zero_optimization`` of DeepSpeed's config; defaults to stage 1 with DeepSpeed's own values.
        accumulates: Whether several batches make a step; defaults to False.
    """

    options: dict[str, Any] = field(default_factory=dict, hash=False)
    accumulates: bool = False

    shards = True

    @property
    def stage(self) -> int:
        """Stage of ZeRO."""
        return int(self.options.get("stage", 1))

    def share(self, module: LoraDiffusion, cuda: bool) -> Share:
        trained = trainable_parameters(module)
        size = -(-sum(one.numel() for one in trained) // self.count)
        state_away = cuda and bool(self.options.get("offload_optimizer"))
        stepped = [nn.Parameter(trained[0].new_empty(0 if state_away else size))]
        part, bucket = size * 4, 4 * int(self.options["reduce_bucket_size"])
        if self.stage < 3:
            # The adapter stays, and each process has its shard of it once more, which the optimizer steps.
            gradients = {"gradients": bucket + part}
            held = {"optimizer state": 0 if state_away else part}
            return Share(held, {}, 0, gradients, stepped, keeps_gradients=self.stage == 1 and self.accumulates)
        weights_away = cuda and bool(self.options.get("offload_param"))
        everything = _by_kind(module.parameters())
        held = {kind: self._held(some, weights_away) - _bytes(some) for kind, some in everything.items()}
        held["gradients"] = bucket
        gathered = {"frozen weights": self._in_flight(module.family.denoiser)}
        encoding = max((_bytes(one.parameters()) for one in module.family.frozen_encoding_models()), default=0)
        return Share(held, gathered, encoding, {"gradients": part}, stepped, keeps_gradients=False)

    def _held(self, parameters: Iterable[Tensor], away: bool) -> int:
        """Bytes of the shards, and of small parameters, which stay gathered once they have been gathered."""
        small = int(self.options.get("stage3_param_persistence_threshold", 100_000))
        return sum(
            (0 if away else -(-one.numel() // self.count) * one.itemsize) + (one.nbytes if one.numel() <= small else 0)
            for one in parameters
        )

    def _in_flight(self, model: nn.Module) -> int:
        """Bytes of the denoiser that are gathered at a time: those of the largest layer, and of those that come next."""
        layers = [_bytes(layer.parameters(recurse=False)) for layer in model.modules()]
        ahead = int(self.options["stage3_prefetch_bucket_size"]) * max(
            (one.itemsize for one in model.parameters() if not one.requires_grad), default=1
        )
        return min(sum(layers), max(layers) + ahead)

    def _divided(self) -> str:
        what = ("optimizer state", "gradients, optimizer state", "weights, gradients, optimizer state")
        host = [name for name in ("optimizer", "param") if self.options.get(f"offload_{name}")]
        return f"1/{self.count} of {what[self.stage - 1]}" + (", partly in host memory" if host else "")


def processes_with(strategy: Any, count: int, on_this_machine: int, accumulates: bool = False) -> Processes:
    """The processes of a run with a strategy.

    Args:
        strategy: Lightning's strategy; None or ``auto`` is what Lightning chooses.
        count: Number of processes on all machines.
        on_this_machine: Number of processes of one machine.
        accumulates: Whether several batches make a step; defaults to False.
    """
    if isinstance(strategy, LitLoraFSDP):
        size = on_this_machine if strategy.shard_size == "node" else strategy.shard_size
        return FSDP2(count, "FSDP2", size or count, strategy.cpu_offload)
    if isinstance(strategy, LitLoraDeepSpeed):
        options = strategy.config["zero_optimization"]
        return Zero(count, f"ZeRO-{options['stage']}", options, accumulates)
    if isinstance(strategy, DDPStrategy):
        return DDP(count, "DDP", bool(strategy._ddp_kwargs.get("gradient_as_bucket_view")))
    if count > 1 and strategy in (None, "auto"):
        return DDP(count, "DDP")
    return Processes(count, strategy if isinstance(strategy, str) else type(strategy).__name__)


@dataclass(frozen=True)
class _Unit:
    """Parameters that FSDP2 gathers together."""

    sizes: Sizes
    around: int
    """Bytes of the units around it, which are gathered meanwhile."""


def _units(model: nn.Module, block_classes: Sequence[str]) -> list[_Unit]:
    """The units of a model in the order in which they compute, as :meth:`PartLoader.sharded_denoiser` shards it."""
    together = read_by_others(model)
    parts = [one for one in sharded_parts(model, block_classes) if one not in together] if block_classes else [model]
    own: dict[nn.Module, list[Tensor]] = {}
    taken: set[int] = set()
    for part in parts:
        own[part] = [one for one in part.parameters() if id(one) not in taken]
        taken.update(map(id, own[part]))
    inside = {part: set(part.modules()) for part in parts}
    return [
        _Unit(
            {kind: _bytes(some) for kind, some in _by_kind(own[part]).items()},
            sum(_bytes(own[other]) for other in parts if other is not part and part in inside[other]),
        )
        for part in parts
    ]


def _gathered(units: Sequence[_Unit], sharing: int) -> Sizes:
    """Bytes that are gathered at the peak.

    While a unit computes, the units around it are gathered too, and a buffer holds what was or will be gathered beside it: in
    the forward pass the same unit, in the backward pass the next one. A further copy of its shards is sent.
    """
    sizes = [sum(unit.sizes.values()) for unit in units]
    beside = [max(sizes[max(0, place - 1) : place + 2]) for place in range(len(units))]
    peaks = [
        unit.around + size + other + other // sharing for unit, size, other in zip(units, sizes, beside, strict=True)
    ]
    place = peaks.index(max(peaks))
    adapter = units[place].sizes["adapter"]
    return {"frozen weights": peaks[place] - adapter, "adapter": adapter}


def _by_kind(parameters: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    kinds: dict[str, list[Tensor]] = {"frozen weights": [], "adapter": []}
    for parameter in parameters:
        kinds["adapter" if parameter.requires_grad else "frozen weights"].append(parameter)
    return kinds


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
