"""A denoiser with its frozen weights in a quantization, read weight by weight."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from lit_lora.blocks import outermost_blocks
from lit_lora.distributed.node import Node
from lit_lora.errors import UserError
from lit_lora.quantization.base import Quantization
from lit_lora.quantization.dense import Dense
from lit_lora.quantization.frozen_layer import can_freeze, put_stored
from lit_lora.quantization.weight_files import WeightFiles, weight_files

_LARGE_LAYER = 8 << 20
"""Weights of a layer that is a part of its own: gathered alone, it is large enough for a network and small beside a block."""


class Weights:
    """The weights of a diffusers model, which come from its files one by one.

    :attr:`model` is there from the beginning, without values; each weight is read, stored and let go by itself, so that the
    model never exists in the precision of its file.

    Args:
        kind: The model's class.
        source: A local folder or hub id.
        folder: The model's folder in it.
        quantization: How the weights of its layers are stored.
        dtype: Of everything else.
        always_skipped: Glob patterns of layers that stay in ``dtype`` whatever the quantization.
        revision: Branch, tag or commit on the hub.
        variant: Weight files of this variant, such as ``fp16``.
        node: Who reads; only there the weights' files have to be.

    Raises:
        OSError: If a file is missing or cannot be read.
        UserError: If the files hold other weights than the model has.
    """

    def __init__(
        self,
        kind: Any,
        source: str,
        folder: str,
        quantization: Quantization,
        dtype: torch.dtype,
        *,
        always_skipped: Sequence[str] = (),
        revision: str | None = None,
        variant: str | None = None,
        node: Node | None = None,
    ) -> None:
        self._quantization, self._dtype, self._skipped = quantization, dtype, always_skipped
        self._node = node or Node()
        options = {"revision": revision} if revision else {}
        config = kind.load_config(source, subfolder=folder, **options)
        with torch.device("meta"):
            self.model: nn.Module = kind.from_config(config)
        self.names = list(dict.fromkeys([*dict(self.model.named_parameters()), *self.model.state_dict()]))
        """All weights, in the model's order."""
        # Kept, since an adapter puts other layers in their places.
        self._layers = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in self.names}
        self._files: WeightFiles | None = None
        self._node.read(lambda: self._open(source, folder, revision, variant))
        _bring_computed_buffers(self.model, kind, config)

    def put(self, name: str) -> None:
        """Read a weight into the model.

        Raises:
            OSError: If its file is damaged.
            UserError: If it has another shape than the model's.
        """
        layer, attribute = self._layers[name], name.rpartition(".")[2]
        form = self._form(name, layer)
        _assign(layer, attribute, self._node.read(lambda: self._stored(name, form)), form)

    def in_parts(self, block_classes: Collection[str]) -> list[tuple[nn.Module, list[str]]]:
        """Modules, and the names of the weights in each that are in none before it: large layers, blocks, at last the model.

        What is between the blocks and the model is a part for each module that computes by itself.

        Args:
            block_classes: Names of the blocks' classes; of blocks inside each other the outermost counts.
        """
        remaining = dict(self._layers)
        parts: list[tuple[nn.Module, list[str]]] = []
        for module in _parts(self.model, set(outermost_blocks(self.model, block_classes))):
            inside = set(module.modules())
            names = [name for name, layer in remaining.items() if layer in inside]
            for name in names:
                del remaining[name]
            parts.append((module, names))
        return parts

    def show_nothing(self) -> None:
        """Let every weight that is still to be read be one nan in the shape that it will have, which takes no memory."""
        for name, layer in self._layers.items():
            attribute = name.rpartition(".")[2]
            shape = _weight(layer, attribute).shape
            nothing = torch.full((), torch.nan, dtype=self._form(name, layer).dtype).expand(shape)
            if attribute in layer._parameters:
                layer._parameters[attribute] = nn.Parameter(nothing, requires_grad=False)

    def _open(self, source: str, folder: str, revision: str | None, variant: str | None) -> dict[str, Tensor]:
        self._files = WeightFiles(self.model, self.names, weight_files(source, folder, revision, variant))
        return {}

    def _form(self, name: str, layer: nn.Module) -> _Form:
        return _form_of(name, layer, self.model, self._quantization, self._dtype, self._skipped)

    def _stored(self, name: str, form: _Form) -> dict[str, Tensor]:
        assert self._files is not None
        tensor, expected = self._files.tensor(name), _weight(self._layers[name], name.rpartition(".")[2]).shape
        if expected != tensor.shape:
            raise UserError(f"{name} is {tuple(tensor.shape)} in the file and {tuple(expected)} in the model")
        return form.quantize(tensor)


def load_model(*args: Any, **kwargs: Any) -> nn.Module:
    """A diffusers model, frozen, whose Linear and Conv2d layers are all :class:`~lit_lora.quantization.frozen_layer.FrozenLayer`.

    Args:
        *args: As for :class:`Weights`.
        **kwargs: As for :class:`Weights`.
    """
    weights = Weights(*args, **kwargs)
    for name in weights.names:
        weights.put(name)
    return weights.model.requires_grad_(False).eval()


def shape_model(
    kind: Any,
    source: str,
    folder: str,
    quantization: Quantization,
    dtype: torch.dtype,
    *,
    always_skipped: Sequence[str] = (),
    revision: str | None = None,
) -> nn.Module:
    """What :func:`load_model` gives, made from the config alone: the values mean nothing.

    Args:
        kind: See :func:`load_model`, as for all arguments.
        source: Here only the config is read from it.
        folder: The model's folder in it.
        quantization: How the weights of its layers are stored.
        dtype: Of everything else.
        always_skipped: Glob patterns of layers that stay in ``dtype``.
        revision: Branch, tag or commit on the hub.
    """
    options = {"revision": revision} if revision else {}
    model = kind.from_config(kind.load_config(source, subfolder=folder, **options)).requires_grad_(False)
    # What a file has: parameters, and buffers that are saved.
    for name, tensor in dict([*model.named_parameters(), *model.state_dict().items()]).items():
        path, _, attribute = name.rpartition(".")
        layer = model.get_submodule(path)
        form = _form_of(name, layer, model, quantization, dtype, always_skipped)
        _assign(layer, attribute, form.quantize(tensor.detach()), form)
    return model.eval()


def load_part(kind: Any, source: str, folder: str, dtype: torch.dtype, node: Node, **options: Any) -> nn.Module:
    """A model of diffusers or transformers in ``dtype``, frozen, by its own ``from_pretrained``.

    Args:
        kind: The model's class.
        source: A local folder or hub id.
        folder: The model's folder in it.
        dtype: Of its weights.
        node: Who reads; only there the weights' files have to be.
        **options: Of ``from_pretrained``.
    """
    model: nn.Module | None = None

    def read() -> dict[str, Tensor]:
        nonlocal model
        model = kind.from_pretrained(source, subfolder=folder, dtype=dtype, **options)
        # Under all their names, and buffers that no file has too.
        return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])

    tensors = node.read(read)
    if model is None:
        options.pop("variant", None)
        with torch.device("meta"):
            model = _from_config(kind, source, folder, options)
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            layer = model.get_submodule(path)
            if attribute in layer._buffers:
                layer._buffers[attribute] = tensor
            else:
                layer._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    return model.requires_grad_(False).eval()


def shape_part(kind: Any, source: str, folder: str, dtype: torch.dtype, revision: str | None = None) -> nn.Module:
    """A model of diffusers or transformers in ``dtype``, made from its config alone: the values mean nothing.

    Args:
        kind: The model's class.
        source: A local folder or hub id, from which only the config is read.
        folder: The model's folder in it.
        dtype: Of its weights.
        revision: Branch, tag or commit on the hub.
    """
    model = _from_config(kind, source, folder, {"revision": revision} if revision else {})
    cast: dict[nn.Parameter, nn.Parameter] = {}  # a weight may be in several layers
    for layer in model.modules():  # not model.to(dtype), which cannot swap fake tensors
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                if parameter not in cast:
                    cast[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                layer._parameters[name] = cast[parameter]
    return model.requires_grad_(False).eval()


def _parts(module: nn.Module, blocks: set[nn.Module], inside: bool = False) -> Iterator[nn.Module]:
    """The parts of a model, inner ones first."""
    block = module in blocks
    around_blocks = not inside and not blocks.isdisjoint(module.modules())
    for child in module.children():
        yield from _parts(child, blocks, inside or block)
    container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    weight = module._parameters.get("weight") if can_freeze(module) else None
    large = weight is not None and weight.numel() >= _LARGE_LAYER
    if block or large or (around_blocks and not container):
        yield module


def _from_config(kind: Any, source: str, folder: str, options: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers or transformers that has not read its weights."""
    if hasattr(kind, "load_config"):
        model: nn.Module = kind.from_config(kind.load_config(source, subfolder=folder, **options))
        return model
    made: nn.Module = kind(kind.config_class.from_pretrained(source, subfolder=folder, **options))
    return made


class _Form(NamedTuple):
    """How one of a model's weights is kept."""

    quantization: Quantization | None
    """None for what is no weight of a layer that can be frozen: it is kept as it is."""
    dtype: torch.dtype
    shape: torch.Size

    def quantize(self, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors to keep, none of them in the file's memory."""
        if self.quantization is None or isinstance(self.quantization, Dense):
            return {"weight": tensor.to(self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)}
        return self.quantization.quantize(tensor)


def _form_of(
    name: str,
    layer: nn.Module,
    model: nn.Module,
    quantization: Quantization,
    dtype: torch.dtype,
    skipped: Sequence[str],
) -> _Form:
    path, _, attribute = name.rpartition(".")
    exact = any(part in name.split(".") for part in getattr(model, "_keep_in_fp32_modules", None) or ())
    frozen = attribute == "weight" and can_freeze(layer)
    stored_so = frozen and quantization.takes(path, skipped) and not exact
    shape = _weight(layer, attribute).shape
    return _Form(quantization if stored_so else Dense() if frozen else None, torch.float32 if exact else dtype, shape)


def _assign(layer: nn.Module, attribute: str, stored: dict[str, Tensor], form: _Form) -> None:
    """Give a layer one of its weights."""
    if form.quantization is not None:
        put_stored(layer, form.quantization, stored, form.shape, form.dtype)
    elif attribute in layer._buffers:
        layer._buffers[attribute] = stored["weight"]
    else:
        trained = _weight(layer, attribute).requires_grad
        layer._parameters[attribute] = nn.Parameter(stored["weight"], requires_grad=trained)


def _weight(layer: nn.Module, attribute: str) -> Tensor:
    tensor = layer._parameters[attribute] if attribute in layer._parameters else layer._buffers[attribute]
    assert tensor is not None
    return tensor


def _bring_computed_buffers(model: nn.Module, kind: Any, config: Any) -> None:
    """Buffers that no file has: the model computes them when it is made."""
    absent = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if absent:
        with init_empty_weights():
            computed = dict(kind.from_config(config).named_buffers())
        for name in absent:
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = computed[name]
