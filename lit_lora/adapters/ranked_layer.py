"""A LoRA layer as a sum of rank-one components that can be scored and removed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from lit_lora.adapters.patterns import layer_patterns
from lit_lora.distributed.collectives import full_shape, full_tensor, gradient_of, shard_like
from lit_lora.distributed.resized import resize_parameter
from lit_lora.errors import UserError


@dataclass(frozen=True)
class KeptSlices:
    """Slices of a parameter that stayed when others were removed.

    Args:
        before: The parameter that optimizers held before.
        parameter: The parameter now; the same object unless FSDP2 has sharded it.
        shape: Full shape before.
        dim: Dimension of the slices.
        indices: Slices that stayed, int64 ``(k,)``.
    """

    before: nn.Parameter
    parameter: nn.Parameter
    shape: torch.Size
    dim: int
    indices: Tensor

    def of(self, values: Tensor) -> Tensor:
        """The same slices of a tensor with one value for each element of the parameter, sharded as the parameter is."""
        full = full_tensor(values)
        return shard_like(_slices(full, self.dim, self.indices), self.parameter)


class RankedLayer:
    """The rank-one components of one LoRA layer, whose update of the weight is ``scaling * sum_i B[:, i] A[i]``.

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

    def gate_gradients(self) -> Tensor | None:
        """Derivative of the loss by a factor on each component, float32 ``(r,)``; None without gradients.

        With factors ``g_i`` of 1, ``g_i B[:, i] A[i]``, it is ``dL/dg_i = <A[i], dL/dA[i]>``, which equals
        ``<B[:, i], dL/dB[:, i]>``. To first order, the loss changes by ``-dL/dg_i`` when the component is removed.
        """
        gradient = gradient_of(self.a)
        if gradient is None:
            return None
        # Under FSDP2 each process has the factors of its rows.
        weight = self.a if isinstance(self.a, DTensor) else full_tensor(self.a)
        return (weight.detach() * gradient).flatten(1).sum(1, dtype=torch.float32)

    def keep(self, indices: Tensor, optimizers: Sequence[Optimizer]) -> list[KeptSlices]:
        """Remove all other components from weights, gradients and optimizer states.

        The scaling of those that stay does not change, since alpha changes with the rank.

        Args:
            indices: Components to keep, int64 ``(k,)``.
            optimizers: Optimizers that may have a state of the layer.

        Returns:
            The slices of both weights that stay.

        Raises:
            UserError: If an optimizer's state is not one value for each element.
        """
        slices: list[KeptSlices] = []
        for parameter, dim in ((self.a, 0), (self.b, 1)):
            shape = full_shape(parameter)
            values = _slices(full_tensor(parameter).detach(), dim, indices)
            slices.append(KeptSlices(parameter, resize_parameter(self.root, parameter, values), shape, dim, indices))
            for optimizer in optimizers:
                _keep_state(optimizer, slices[-1])
        self.set_rank(len(indices))
        return slices

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
    """Write the layers' ranks and alphas into their config, as ``rank_pattern`` and ``alpha_pattern``."""
    for config in {id(layer.config): layer.config for layer in layers}.values():
        own = [layer for layer in layers if layer.config is config]
        config.rank_pattern = layer_patterns({layer.name: layer.rank for layer in own})
        config.alpha_pattern = layer_patterns({layer.name: layer.layer.lora_alpha[ADAPTER_NAME] for layer in own})


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


def _slices(values: Tensor, dim: int, indices: Tensor) -> Tensor:
    return values.index_select(dim, indices.to(values.device)).contiguous()


def _keep_state(optimizer: Optimizer, kept: KeptSlices) -> None:
    _swap(optimizer, kept.before, kept.parameter)
    if kept.before not in optimizer.state:
        return
    state: dict[str, Any] = optimizer.state.pop(kept.before)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.numel() <= 1:
            continue
        if value.shape != kept.shape:
            raise UserError(
                f"{type(optimizer).__name__} keeps {name} in the shape {tuple(value.shape)} for weights of the shape "
                f"{tuple(kept.shape)}, so that RankBudget cannot prune it with the ranks; use an optimizer with one value for "
                f"each element, such as torch.optim.AdamW"
            )
        state[name] = kept.of(value)
    optimizer.state[kept.parameter] = state


def _swap(optimizer: Optimizer, before: nn.Parameter, now: nn.Parameter) -> None:
    """Let an optimizer hold another object in the place of a parameter."""
    for group in optimizer.param_groups:
        group["params"] = [now if one is before else one for one in group["params"]]
