"""Loading a model with quantized frozen weights, weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from lit_lora.distributed.node import Node, bundles
from lit_lora.errors import UserError
from lit_lora.quantization.base import Quantization
from lit_lora.quantization.dense import Dense
from lit_lora.quantization.encoders import put_encoder_tensors
from lit_lora.quantization.frozen_layer import can_freeze, freezable, put_stored
from lit_lora.quantization.saved_quantized import saved_method
from lit_lora.quantization.sharded_parts import sharded_parts
from lit_lora.quantization.weight_change import Changes, check_changes
from lit_lora.quantization.weight_files import TRANSFORMERS_STEM, StoredTensors, WeightFiles, weight_files

_BUNDLE_ELEMENTS = 2**22
"""So many elements of weights are sent to the other processes of a machine together."""


class Weights:
    """The weights of a diffusers model, read from its files one by one.

    :attr:`model` exists from the beginning, on the meta device. Each weight is read, quantized and freed before the next, so
    the model never exists in the precision of its files.

    Args:
        kind: Class of the model.
        source: Local folder or hub id.
        folder: Subfolder of the model.
        quantization: Quantization of the Linear and Conv2d weights.
        dtype: dtype of all other weights.
        always_skipped: Glob patterns of layers that stay in ``dtype`` whatever the quantization; none by default.
        revision: Branch, tag or commit on the hub; defaults to the hub's default branch.
        variant: Variant of the weight files, such as ``fp16``; none by default.
        node: Processes of this machine; defaults to this process alone. Only the reading process needs the weight files.
        changes: Changes of weights before they are quantized; defaults to none.
        open_file: Function from the model and its weights' names to a function that reads a weight by its name; defaults to one
            for the files in the folder.

    Raises:
        OSError: If a file is missing or damaged.
        UserError: If the files do not hold exactly the model's weights, or the model lacks weights to change.
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
        changes: Changes | None = None,
        open_file: Callable[[nn.Module, Sequence[str]], Callable[[str], Tensor]] | None = None,
    ) -> None:
        self._changes = changes or {}
        self._quantization, self._dtype, self._skipped = quantization, dtype, always_skipped
        self._node = node or Node()
        options = {"revision": revision} if revision else {}
        config = kind.load_config(source, subfolder=folder, **options)
        with torch.device("meta"):
            self.model: nn.Module = kind.from_config(config)
        self.names = list(dict.fromkeys([*dict(self.model.named_parameters()), *self.model.state_dict()]))
        """Names of all weights, in the model's order."""
        check_changes(self._changes, set(self.names), self.model)
        quantization.check_skipped(freezable(self.model))
        # Looked up now, because an adapter replaces layers later.
        self._layers = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in self.names}
        self._read: Callable[[str], Tensor] | None = None

        def open_folder(model: nn.Module, names: Sequence[str]) -> Callable[[str], Tensor]:
            method = saved_method(config, f"{source}/{folder}")
            return WeightFiles(model, names, weight_files(source, folder, revision, variant), method).tensor

        self._node.read(lambda: self._open(open_file or open_folder))
        _bring_computed_tensors(self.model, kind, config)

    def put(self, names: Sequence[str]) -> None:
        """Read weights and put them into the model.

        Args:
            names: Names of the weights, of those in :attr:`names`.

        Raises:
            OSError: If a file is damaged.
            UserError: If a weight's shape differs from the model's.
        """
        forms = {name: self._form(name, self._layers[name]) for name in names}
        frozen = [name for name, form in forms.items() if form.quantization is not None]
        others = [name for name, form in forms.items() if form.quantization is None]
        for chosen, may_be_mapped in ((frozen, True), (others, False)):
            for bundle in bundles(chosen, lambda name: forms[name].shape.numel(), _BUNDLE_ELEMENTS):
                stored: dict[str, dict[str, Tensor]] = {name: {} for name in bundle}
                tensors = self._node.read(partial(self._stored, {name: forms[name] for name in bundle}), may_be_mapped)
                for path, tensor in tensors.items():
                    name, _, part = path.rpartition("/")
                    stored[name][part] = tensor
                for name in bundle:
                    _assign(self._layers[name], name.rpartition(".")[2], stored[name], forms[name])

    def unquantized(self, name: str, stored_in: torch.dtype | None = None) -> Tensor:
        """Read a weight as it is before it is quantized, in the reading process.

        Args:
            name: Name of the weight, one of :attr:`names`.
            stored_in: dtype in which it is kept without quantization, to count what that rounds away of a change; defaults to
                None, which counts nothing.

        Raises:
            OSError: If its file is damaged.
            UserError: If its shape differs from the model's.
        """
        assert self._read is not None, "only the reading process has opened the files"
        tensor, expected = self._read(name), _weight(self._layers[name], name.rpartition(".")[2]).shape
        if expected != tensor.shape:
            raise UserError(f"{name} is {tuple(tensor.shape)} in the file and {tuple(expected)} in the model")
        change = self._changes.get(name)
        return tensor if change is None else change.applied(tensor, stored_in)

    def in_parts(self, block_classes: Collection[str]) -> list[tuple[nn.Module, list[str]]]:
        """Parts of the model to load and shard one by one: large layers, blocks, modules around blocks, finally the model.

        Each part comes with the names of its weights that no earlier part has.

        Args:
            block_classes: Class names of the blocks; of nested blocks the outermost is a part.
        """
        remaining = dict(self._layers)
        parts: list[tuple[nn.Module, list[str]]] = []
        for module in sharded_parts(self.model, block_classes):
            inside = set(module.modules())
            names = [name for name, layer in remaining.items() if layer in inside]
            for name in names:
                del remaining[name]
            parts.append((module, names))
        return parts

    def show_nothing(self) -> None:
        """Set every weight that is not read yet to an expanded nan of its shape, which takes no memory."""
        for name, layer in self._layers.items():
            attribute = name.rpartition(".")[2]
            shape = _weight(layer, attribute).shape
            nothing = torch.full((), torch.nan, dtype=self._form(name, layer).dtype).expand(shape)
            if attribute in layer._parameters:
                layer._parameters[attribute] = nn.Parameter(nothing, requires_grad=False)

    def _open(self, open_files: Callable[[nn.Module, Sequence[str]], Callable[[str], Tensor]]) -> dict[str, Tensor]:
        self._read = open_files(self.model, self.names)
        return {}

    def _form(self, name: str, layer: nn.Module) -> _Form:
        return _form_of(name, layer, self.model, self._quantization, self._dtype, self._skipped)

    def _stored(self, forms: Mapping[str, _Form]) -> dict[str, Tensor]:
        return {
            f"{name}/{part}": tensor
            for name, form in forms.items()
            for part, tensor in form.quantize(self.unquantized(name, form.kept_dtype)).items()
        }


def load_model(*args: Any, **kwargs: Any) -> nn.Module:
    """Load a diffusers model, frozen, with quantized Linear and Conv2d layers.

    Args:
        *args: Arguments of :class:`Weights`.
        **kwargs: Arguments of :class:`Weights`.
    """
    weights = Weights(*args, **kwargs)
    weights.put(weights.names)
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
    """Build the model of :func:`load_model` from its config alone, with meaningless values.

    Args:
        kind: Class of the model.
        source: Local folder or hub id, of which only the config is read.
        folder: Subfolder of the model.
        quantization: Quantization of the Linear and Conv2d weights.
        dtype: dtype of all other weights.
        always_skipped: Glob patterns of layers that stay in ``dtype``; none by default.
        revision: Branch, tag or commit on the hub; defaults to the hub's default branch.
    """
    options = {"revision": revision} if revision else {}
    model = kind.from_config(kind.load_config(source, subfolder=folder, **options)).requires_grad_(False)
    quantization.check_skipped(freezable(model))
    # The tensors that a file holds: parameters and persistent buffers.
    for name, tensor in dict([*model.named_parameters(), *model.state_dict().items()]).items():
        path, _, attribute = name.rpartition(".")
        layer = model.get_submodule(path)
        form = _form_of(name, layer, model, quantization, dtype, always_skipped)
        _assign(layer, attribute, form.quantize(tensor.detach()), form)
    return model.eval()


def load_part(
    kind: Any,
    source: str,
    folder: str,
    dtype: torch.dtype,
    node: Node,
    load: Callable[..., nn.Module] | None = None,
    quantization: Quantization | None = None,
    **options: Any,
) -> nn.Module:
    """Load a model of diffusers or transformers, frozen.

    Args:
        kind: Class of the model.
        source: Local folder or hub id.
        folder: Subfolder of the model.
        dtype: dtype of the weights.
        node: Processes of this machine; only the reading process needs the weight files.
        load: Function from class, source, subfolder, dtype and options to the model; defaults to the class's ``from_pretrained``.
        quantization: Quantization with which ``load`` stores weights; defaults to none.
        **options: Options of ``from_pretrained``.
    """
    model: nn.Module | None = None

    def read() -> dict[str, Tensor]:
        nonlocal model
        if load is None:
            model = _pretrained(kind, source, folder, dtype, **options)
        else:
            model = load(kind, source, folder, dtype, **options)
        # Shared weights under all their names, and non-persistent buffers too.
        return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])

    tensors = node.read(read)
    if model is None:
        options.pop("variant", None)
        with torch.device("meta"):
            model = _from_config(kind, source, folder, options)
        put = set() if quantization is None else put_encoder_tensors(model, tensors, quantization, dtype)
        for name, tensor in tensors.items():
            if name in put:
                continue
            path, _, attribute = name.rpartition(".")
            layer = model.get_submodule(path)
            if attribute in layer._buffers:
                layer._buffers[attribute] = tensor
            else:
                layer._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    return model.requires_grad_(False).eval()


def shape_part(kind: Any, source: str, folder: str, dtype: torch.dtype, revision: str | None = None) -> nn.Module:
    """Build the model of :func:`load_part` from its config alone, with meaningless values.

    Args:
        kind: Class of the model.
        source: Local folder or hub id, of which only the config is read.
        folder: Subfolder of the model.
        dtype: dtype of the weights.
        revision: Branch, tag or commit on the hub; defaults to the hub's default branch.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does, for buffers
    try:
        model = _from_config(kind, source, folder, {"revision": revision} if revision else {})
    finally:
        torch.set_default_dtype(before)
    cast: dict[nn.Parameter, nn.Parameter] = {}  # layers may share a weight
    for layer in model.modules():  # not model.to(dtype), which cannot swap fake tensors
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                if parameter not in cast:
                    cast[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                layer._parameters[name] = cast[parameter]
        for name, buffer in layer._buffers.items():  # those in the files come in the same dtype
            if buffer is not None and buffer.is_floating_point() and name not in layer._non_persistent_buffers_set:
                layer._buffers[name] = buffer.to(dtype)
    return model.requires_grad_(False).eval()


def _pretrained(kind: Any, source: str, folder: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A model of diffusers or transformers; weights of text encoders that were saved quantized are restored."""
    revision = {"revision": options["revision"]} if "revision" in options else {}
    of_diffusers = hasattr(kind, "load_config")
    config = (kind.load_config if of_diffusers else kind.config_class.from_pretrained)(
        source, subfolder=folder, **revision
    )
    method = saved_method(config if of_diffusers else config.to_dict(), f"{source}/{folder}")
    if method is None:
        whole: nn.Module = kind.from_pretrained(source, subfolder=folder, dtype=dtype, **options)
        return whole
    if of_diffusers:
        raise UserError(
            f"the weights of {source}/{folder} were quantized by {method} when they were saved, which is read for denoisers and "
            f"text encoders; set vae to the same VAE in bf16, fp16 or float32"
        )
    del config.quantization_config
    files = weight_files(source, folder, options.get("revision"), options.get("variant"), TRANSFORMERS_STEM)
    stored = StoredTensors(files, method)
    restored = {name: stored.tensor(name) for name in stored.names}
    made: nn.Module = kind.from_pretrained(None, config=config, state_dict=restored, dtype=dtype)
    return made


def _from_config(kind: Any, source: str, folder: str, options: Mapping[str, Any]) -> nn.Module:
    """Build a model of diffusers or transformers without loading its weights."""
    if hasattr(kind, "load_config"):
        model: nn.Module = kind.from_config(kind.load_config(source, subfolder=folder, **options))
        return model
    made: nn.Module = kind(kind.config_class.from_pretrained(source, subfolder=folder, **options))
    return made


class _Form(NamedTuple):
    """How one weight of a model is stored."""

    quantization: Quantization | None
    """None for tensors that are not the weight of a Linear or Conv2d layer; they are stored without quantization."""
    dtype: torch.dtype
    shape: torch.Size

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """Dtype of a weight that is not quantized; None for one that is."""
        return self.dtype if self.quantization is None or isinstance(self.quantization, Dense) else None

    def quantize(self, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors to store; none of them shares memory with the file."""
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
    quantized = frozen and quantization.takes(path, skipped) and not exact
    shape = _weight(layer, attribute).shape
    return _Form(quantization if quantized else Dense() if frozen else None, torch.float32 if exact else dtype, shape)


def _assign(layer: nn.Module, attribute: str, stored: dict[str, Tensor], form: _Form) -> None:
    """Put a weight into its layer."""
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


def _bring_computed_tensors(model: nn.Module, kind: Any, config: Any) -> None:
    """Fill tensors that no file holds and the model computes when it is built: non-persistent buffers and plain attributes."""
    absent = [
        (path, name)
        for path, module in model.named_modules()
        for name, value in (*module._buffers.items(), *vars(module).items())
        if isinstance(value, Tensor) and value.is_meta
    ]
    if absent:
        with init_empty_weights():
            computed = kind.from_config(config)
        for path, name in absent:
            setattr(model.get_submodule(path), name, getattr(computed.get_submodule(path), name))
