"""A LoRA layer as a sum of rank-one components that can be scored and removed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_lora.adapters.in_place import peft_models
from lit_lora.adapters.inject import ADAPTER_NAME
from lit_lora.adapters.names import tuner_layers
from lit_lora.adapters.parameter_groups import plain_name
from lit_lora.adapters.patterns import layer_patterns, pattern_value
from lit_lora.distributed.collectives import full_shape, full_tensor, gradient_of, shard_like
from lit_lora.distributed.resized import resize_parameter
from lit_lora.errors import UserError


@dataclass(frozen=True)
class ProjectedParameter:
    """A parameter after its components were projected on fewer axes.

    Args:
        before: The parameter that optimizers held before.
        parameter: The parameter now; the same object unless FSDP2 has sharded it.
        shape: Full shape before.
        dim: Dimension of the components.
        axes: Axes in the space of the components, orthonormal columns ``(r, k)``.
    """

    before: nn.Parameter
    parameter: nn.Parameter
    shape: torch.Size
    dim: int
    axes: Tensor

    def of(self, values: Tensor) -> Tensor:
        """The same projection of a tensor that is linear in the parameter, such as its average, sharded as it is."""
        return shard_like(_project(full_tensor(values), self.dim, self.axes), self.parameter)

    def of_state(self, values: Tensor) -> Tensor:
        """The projection of an optimizer's state with one value for each element of the parameter.

        A state that has negative values is linear in the gradients or the weights, as a momentum is. One that has none is a
        mean of squares, as Adam's second moment is: the new one is the old one's mean, weighted by the squares of the axes,
        which leaves out how the gradients of the components go together.
        """
        full = full_tensor(values)
        axes = self.axes.square() if bool((full >= 0).all()) else self.axes
        return shard_like(_project(full, self.dim, axes), self.parameter)


class RankedLayer:
    """The rank-one components of one LoRA layer, whose update of the weight is ``scaling * sum_i B[:, i] A[i]``.

    The update does not change when ``A`` and ``B`` become ``Q^T A`` and ``B Q`` with an orthogonal ``Q``. Its columns are the
    axes of other components, ``B q`` and ``q^T A``.

    Args:
        root: Module that contains the layer.
        path: Path of the layer in ``root``.
        name: Path of the layer in the adapted model.
        layer: LoRA layer of a Linear layer or of a Conv2d layer without groups.
        config: Config of the adapter.
    """

    def __init__(self, root: nn.Module, path: str, name: str, layer: LoraLayer, config: LoraConfig) -> None:
        self.root = root
        self.path = path
        self.name = name
        self.layer = layer
        self.config = config
        self.scaling: float = layer.scaling[ADAPTER_NAME]

    @property
    def a(self) -> nn.Parameter:
        """Down-projection, ``(r, in)`` or ``(r, in, height, width)``."""
        weight: nn.Parameter = self.layer.lora_A[ADAPTER_NAME].weight
        return weight

    @property
    def b(self) -> nn.Parameter:
        """Up-projection, ``(out, r)`` or ``(out, r, 1, 1)``."""
        weight: nn.Parameter = self.layer.lora_B[ADAPTER_NAME].weight
        return weight

    @property
    def rank(self) -> int:
        """Number of components."""
        return int(full_shape(self.a)[0])

    @property
    def component_parameters(self) -> int:
        """Number of parameters of one component."""
        return (full_shape(self.a).numel() + full_shape(self.b).numel()) // self.rank

    def principal_axes(self) -> Tensor:
        """Axes whose components ``B q`` are orthogonal, the largest first, float32 ``(r, r)`` on the layer's device.

        They are the right singular vectors of ``B``. A few of such components hold most of the update, where as trained each of
        them holds a part of everything. A collective call where ``B`` is sharded.
        """
        b = full_tensor(self.b).detach().flatten(1).double()
        # On the CPU, so that it is the same in all processes.
        axes = torch.linalg.eigh((b.T @ b).cpu()).eigenvectors.flip(1)
        return axes.float().to(self.b.device)

    def gate_gradients(self, axes: Tensor) -> Tensor | None:
        """Derivative of the loss by a factor on each component, float32 ``(k,)``; None without gradients.

        With factors ``g`` of 1, ``g B q q^T A``, it is ``dL/dg = <B q, dL/dB q>``, which equals ``<q^T A, q^T dL/dA>``. To first
        order, the loss changes by ``-dL/dg`` when the component is removed.

        Args:
            axes: Axes of the components, columns ``(r, k)``.

        Returns:
            The derivatives; under FSDP2 the part that the rows of this process have in them, whose sum
            :func:`~lit_lora.distributed.collectives.sum_of_shards` is.
        """
        gradient = gradient_of(self.b)
        if gradient is None:
            return None
        weight = self.b if isinstance(self.b, DTensor) else full_tensor(self.b)
        values = [value.to_local() if isinstance(value, DTensor) else value for value in (weight.detach(), gradient)]
        b, of_b = (value.flatten(1).float() @ axes for value in values)
        return (b * of_b).sum(0)

    def keep(self, axes: Tensor, optimizers: Sequence[Optimizer]) -> list[ProjectedParameter]:
        """Keep the components of some axes, and remove what is orthogonal to them from weights and optimizer states.

        The scaling does not change, since alpha changes with the rank.

        Args:
            axes: Axes of the components to keep, orthonormal columns ``(r, k)``, equal in all processes.
            optimizers: Optimizers that may have a state of the layer.

        Returns:
            What became of both weights.

        Raises:
            UserError: If an optimizer's state is not one value for each element.
        """
        projected: list[ProjectedParameter] = []
        for parameter, dim in ((self.a, 0), (self.b, 1)):
            shape = full_shape(parameter)
            values = _project(full_tensor(parameter).detach(), dim, axes)
            new = resize_parameter(self.root, parameter, values)
            projected.append(ProjectedParameter(parameter, new, shape, dim, axes))
            for optimizer in optimizers:
                _project_state(optimizer, projected[-1])
        self.set_rank(axes.shape[1])
        return projected

    def replace(self, a: Tensor, b: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Set new components, whose number may differ, and drop the optimizers' states of the layer.

        Args:
            a: Full down-projection, ``(k, in)`` or ``(k, in, height, width)``, equal in all processes.
            b: Full up-projection, ``(out, k)`` or ``(out, k, 1, 1)``, equal in all processes.
            optimizers: Optimizers that may have a state of the layer.
        """
        for parameter, values in ((self.a, a), (self.b, b)):
            new = resize_parameter(self.root, parameter, values.to(parameter.device, parameter.dtype).contiguous())
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)
                _swap(optimizer, parameter, new)
        self.set_rank(len(a))

    def set_rank(self, rank: int) -> None:
        """Set the layer's rank, and the alpha with which its scaling stays the same."""
        layer: Any = self.layer
        down, up = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
        for owner, fields in ((down, ("out_features", "out_channels")), (up, ("in_features", "in_channels"))):
            for field in fields:
                if hasattr(owner, field):
                    setattr(owner, field, rank)
        divisor = math.sqrt(rank) if self.config.use_rslora else rank
        # The scaling itself stays, to the last bit: compiled blocks are compiled for it.
        layer.r[ADAPTER_NAME], layer.lora_alpha[ADAPTER_NAME] = rank, self.scaling * divisor


def ranked_layers(module: nn.Module, user: str = "RankBudget") -> list[RankedLayer]:
    """The LoRA layers of a module whose ranks can change, sorted by path.

    Embeddings, convolutions with groups and layers of other kinds stay out.

    Args:
        module: Any module that contains adapted models.
        user: Name of the callback that changes the layers, for errors; defaults to ``RankBudget``.

    Raises:
        UserError: If an adapter is neither LoRA nor its variants rsLoRA and DoRA.
    """
    found: list[RankedLayer] = []
    for path, model in peft_models(module):
        config = model.peft_config[ADAPTER_NAME]
        _check_config(config, user)
        for name, layer in tuner_layers(model, LoraLayer):
            if _is_ranked(layer):
                found.append(RankedLayer(module, ".".join(filter(None, (path, name))), name, layer, config))
    return sorted(found, key=lambda layer: layer.path)


def note_ranks(layers: Sequence[RankedLayer]) -> None:
    """Write the layers' ranks and alphas into their config, as ``rank_pattern`` and ``alpha_pattern``.

    A config that has these ranks stays as it is, so that a run that resumes has the same.
    """
    for config in {id(layer.config): layer.config for layer in layers}.values():
        own = [layer for layer in layers if layer.config is config]
        if all(layer.rank == _rank_of(config, layer.name) for layer in own):
            continue
        config.rank_pattern = layer_patterns({layer.name: layer.rank for layer in own})
        config.alpha_pattern = layer_patterns({layer.name: layer.layer.lora_alpha[ADAPTER_NAME] for layer in own})


def _rank_of(config: LoraConfig, name: str) -> int:
    """The rank that a config gives to a layer."""
    return int(pattern_value(config.rank_pattern, name, config.r))


def match_checkpoint(
    layers: Sequence[RankedLayer], state_dict: dict[str, Any], optimizers: Sequence[Optimizer]
) -> None:
    """Give layers the ranks of a checkpoint that is about to be loaded.

    Args:
        layers: Layers whose ranks may have changed before the checkpoint was saved.
        state_dict: Weights of the module, full tensors; where FSDP2 shards a layer of another rank, its weights are sharded.
        optimizers: Optimizers that hold the layers' weights.
    """
    changed = False
    for layer in layers:
        keys = [f"{layer.path}.lora_{which}.{ADAPTER_NAME}.weight" for which in "AB"]
        if not all(key in state_dict for key in keys) or len(state_dict[keys[0]]) == layer.rank:
            continue
        changed = True
        a, b = (state_dict[key].detach() for key in keys)
        layer.replace(a, b, optimizers)
        for key, parameter in zip(keys, (layer.a, layer.b), strict=True):
            state_dict[key] = shard_like(state_dict[key], parameter)
    if changed:
        note_ranks(layers)


def layer_ranks(module: nn.Module) -> dict[str, int]:
    """The rank of each LoRA layer in a module, by the layer's name in the adapted model.

    With several adapted models names begin with the model's.
    """
    models = list(peft_models(module))
    return {
        name if len(models) == 1 else plain_name(f"{path}.{name}"): int(layer.r[ADAPTER_NAME])
        for path, model in models
        for name, layer in tuner_layers(model, LoraLayer)
        if ADAPTER_NAME in layer.r
    }


def _is_ranked(layer: LoraLayer) -> bool:
    if ADAPTER_NAME not in layer.lora_A:
        return False
    return isinstance(layer, Linear) or (isinstance(layer, Conv2d) and layer.get_base_layer().groups == 1)


def _check_config(config: Any, user: str) -> None:
    if type(config) is not LoraConfig:
        raise UserError(
            f"{user} changes the layers of LoRA, and the adapter is {type(config).__name__}; use peft.LoraConfig, or remove "
            f"{user} from trainer.callbacks"
        )
    if variants := list(_other_variants(config)):
        raise UserError(
            f"{user} changes the layers of LoRA, rsLoRA and DoRA, and the adapter sets {', '.join(variants)}; remove these "
            f"options, or remove {user} from trainer.callbacks"
        )


def _other_variants(config: LoraConfig) -> Iterator[str]:
    """Names of options that give LoRA layers further tensors or another forward pass."""
    for name, field in type(config).__dataclass_fields__.items():
        if field.metadata.get("is_lora_variant") and name != "use_dora" and getattr(config, name):
            yield name
    if config.init_lora_weights == "mica":  # its frozen B must keep its values
        yield "init_lora_weights='mica'"
    if config.layer_replication:
        yield "layer_replication"
    if config.target_parameters:
        yield "target_parameters"


def _project(values: Tensor, dim: int, axes: Tensor) -> Tensor:
    """Combine the slices along one dimension: slice j of the result is the sum of ``axes[i, j]`` times slice i."""
    axes = axes.to(values.device, values.dtype)
    projected = torch.tensordot(values, axes, dims=([dim], [0])).movedim(-1, dim)
    # A copy also where all strides that matter are right: a convolution chooses its kernel by those that do not.
    return projected.clone(memory_format=torch.contiguous_format)


def _project_state(optimizer: Optimizer, projected: ProjectedParameter) -> None:
    _swap(optimizer, projected.before, projected.parameter)
    if projected.before not in optimizer.state:
        return
    state: dict[str, Any] = optimizer.state.pop(projected.before)
    for name, value in _elementwise(optimizer, state, projected.shape):
        state[name] = projected.of_state(value)
    optimizer.state[projected.parameter] = state


def check_prunable(layers: Sequence[RankedLayer], optimizers: Sequence[Optimizer]) -> bool:
    """Check that the optimizers' states of layers can be pruned with their ranks.

    Returns:
        Whether there are states; a skipped step makes none.

    Raises:
        UserError: If a state is not one value for each element.
    """
    found = False
    for layer in layers:
        for parameter, optimizer in itertools.product((layer.a, layer.b), optimizers):
            if parameter in optimizer.state:
                _elementwise(optimizer, optimizer.state[parameter], full_shape(parameter))
                found = True
    return found


def _elementwise(optimizer: Optimizer, state: Mapping[str, Any], shape: torch.Size) -> list[tuple[str, Tensor]]:
    """The entries of a parameter's state that have one value for each of its elements; the others are numbers."""
    tensors = [(name, value) for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1]
    for name, value in tensors:
        if value.shape != shape or not value.is_floating_point():
            raise UserError(
                f"{type(optimizer).__name__} keeps {name} as {tuple(value.shape)} of {value.dtype} for weights of the shape "
                f"{tuple(shape)}, so that RankBudget cannot prune it with the ranks; use an optimizer with one value for each "
                f"element, such as torch.optim.AdamW"
            )
    return tensors


def _swap(optimizer: Optimizer, before: nn.Parameter, now: nn.Parameter) -> None:
    """Let an optimizer hold another object in the place of a parameter."""
    for group in optimizer.param_groups:
        group["params"] = [now if one is before else one for one in group["params"]]
