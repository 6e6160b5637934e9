"""A model in one file, as vendors publish it and A1111, Forge and ComfyUI read it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    LDM_UNET_KEY,
    LDM_VAE_KEYS,
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
    infer_diffusers_model_type,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5EncoderModel

from lit_lora.errors import UserError
from lit_lora.families.deferred import Deferred
from lit_lora.families.gguf_file import open_gguf
from lit_lora.families.identity import file_digest
from lit_lora.quantization.weight_files import check_weights
from lit_lora.tensor_reader import TensorReader

ENDINGS = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth")
"""Endings of files that are taken for models in one file."""

_UNET = f"{LDM_UNET_KEY}input_blocks.0.0.weight"
_UNPREFIXED = ("Flux2Transformer2DModel",)
"""Denoisers whose conversion function in diffusers 0.42 takes names without the prefix that ComfyUI saves all denoisers with."""
_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
_OF_ADAPTERS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".hada_w", ".lokr_w", "lora_unet_", "lora_te")
_OF_SCALES = (".scale_weight", ".weight_scale", ".comfy_quant", ".absmax", "scaled_fp8")
_DIGESTED = 1 << 16


class SingleFile:
    """A file with the weights of a denoiser, and often of a VAE and text encoders, under their original names.

    A safetensors file, or a GGUF file of a denoiser, whose weights are dequantized one by one.

    diffusers' functions for ``from_single_file`` convert names and shapes; the weights are read and converted one by one.

    Args:
        path: The file.

    Raises:
        UserError: If it is missing, damaged, pickled, an adapter, or has weights with scales of their own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"there is no file {path}; name a file, a folder that save_pretrained wrote, or a hub id")
        self._is_gguf = path.suffix == ".gguf"
        if path.suffix not in (".safetensors", ".gguf"):
            raise UserError(
                f"{path} is pickled, and reading it could run any program; take the model's .safetensors file, or save it as "
                f"one with a tool that you trust it to"
            )
        self._read, shown = open_gguf(path) if self._is_gguf else _safetensors(path)
        self._tensors = {name: Deferred(one, partial(self._read, name)) for name, one in shown.items()}
        self._check()

    @property
    def model_type(self) -> str | None:
        """What diffusers calls this kind of model, such as ``xl_base``; None if it is not known."""
        found: str = infer_diffusers_model_type(self._tensors)
        # diffusers' answer for all that it does not know.
        return None if found == "v1" and _UNET not in self._tensors else found

    @property
    def repository(self) -> str | None:
        """Repository on the hub with the configs of this kind of model; None if it is not known."""
        paths = DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(self.model_type)
        return None if paths is None else str(paths["pretrained_model_name_or_path"])

    def holds(self, kind: type[Any]) -> bool:
        """Whether the file has weights for a VAE or text encoder.

        Args:
            kind: Class of the VAE or text encoder.
        """
        if self._is_gguf:
            return False
        if issubclass(kind, ModelMixin):
            return bool(self._of_vae())
        if issubclass(kind, T5EncoderModel):
            return is_t5_in_single_file(self._tensors)
        return is_clip_model_in_single_file(kind, self._tensors)

    def open(self, model: nn.Module, names: Sequence[str]) -> Callable[[str], Tensor]:
        """A function that reads a weight of a diffusers model by its name there; nothing is read yet.

        Args:
            model: The model; only names, shapes and its config are used.
            names: Names of all its weights.

        Raises:
            UserError: If the file does not hold exactly the model's weights.
        """
        tensors = dict(self._tensors)
        if not set(names) <= tensors.keys():  # otherwise they have diffusers' names
            tensors = self._converted(model, tensors)
            check_weights(self.path, model, names, tensors)
        return lambda name: tensors[name].value()

    def load(self, kind: Any, location: str, subfolder: str, dtype: torch.dtype, **options: Any) -> nn.Module:
        """Load a VAE or text encoder that the file :meth:`holds`, or a VAE from a file of its own.

        Args:
            kind: Class of the model.
            location: Folder or hub id of its config.
            subfolder: Subfolder of its config.
            dtype: dtype of its weights.
            **options: Options of reading the config, such as ``revision``.

        Raises:
            UserError: If the file does not hold exactly the model's weights.
        """
        if issubclass(kind, ModelMixin):
            with init_empty_weights():
                model = kind.from_config(kind.load_config(location, subfolder=subfolder, **options))
            names = list(model.state_dict())
            read = self.open(model, names)
            for name in names:
                set_module_tensor_to_device(
                    model, name, "cpu", value=_fitting(self.path, model, name, read), dtype=dtype
                )
            return model
        make: Any = create_diffusers_clip_model_from_ldm
        if issubclass(kind, T5EncoderModel):
            make = create_diffusers_t5_model_from_checkpoint
        # Mapped: what is not used of the file is not read.
        model = make(kind, load_file(self.path), subfolder=subfolder, config=location, torch_dtype=dtype)
        if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise UserError(f"{self.path} has no weights for {missing[0]} of a {kind.__name__}; take another file")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # not the file's memory, in case the file changes
        return model

    def digest(self, part: str) -> str:
        """Digest of the weights of a part, of each tensor the name, shape, dtype and up to 64 KiB; empty if there are none.

        Args:
            part: ``vae``, ``text`` or ``denoiser``, which are all others.
        """
        of_text = [name for name in self._tensors if name.startswith(_TEXT)]
        others = {*self._of_vae(), *of_text}
        denoiser = [name for name in self._tensors if name not in others]
        names = {"vae": self._of_vae(), "text": of_text, "denoiser": denoiser}[part]
        if self._is_gguf and names:  # all of one part, whose weights would have to be dequantized
            return f"blake2b:{file_digest(self.path).hex()}"
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(names):
            tensor = self._read(name)
            digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
            digest.update(tensor.flatten()[: _DIGESTED // tensor.element_size()].view(torch.uint8).numpy().tobytes())
        return f"blake2b:{digest.hexdigest()}" if names else ""

    def _of_vae(self) -> list[str]:
        """Names of the VAE's tensors, of which there may be no others."""
        marked = [name for name in self._tensors if name.startswith(tuple(LDM_VAE_KEYS))]
        alone = any(name.startswith("decoder.") for name in self._tensors)
        return marked or (list(self._tensors) if alone else [])

    def _converted(self, model: nn.Module, tensors: dict[str, Deferred]) -> dict[str, Deferred]:
        known = [one.__name__ for one in type(model).__mro__ if one.__name__ in SINGLE_FILE_LOADABLE_CLASSES]
        wrong = f"{self.path} does not hold the weights of a {type(model).__name__}"
        if not known:
            raise UserError(f"{wrong} under diffusers' names, and diffusers does not convert others; name a folder")
        convert: Any = SINGLE_FILE_LOADABLE_CLASSES[known[0]]["checkpoint_mapping_fn"]
        config: Any = model.config
        if known[0] in _UNPREFIXED and any(name.startswith(LDM_UNET_KEY) for name in tensors):
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(LDM_UNET_KEY)}
            tensors = {name.removeprefix(LDM_UNET_KEY): tensor for name, tensor in own.items()}
        try:
            with torch.no_grad():
                converted: dict[str, Deferred] = convert(checkpoint=tensors, config=dict(config))
        except (KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise UserError(f"{wrong}, or not of its config: diffusers cannot convert them ({error!r})") from error
        return converted

    def _check(self) -> None:
        if found := [name for name in self._tensors if any(part in name for part in _OF_ADAPTERS)]:
            raise UserError(
                f"{self.path} is an adapter, not a base: it has {found[0]}. Name the base that it was trained on, and give the "
                f"adapter as FromFile, in base_adapters, or with --adapter"
            )
        if found := [name for name in self._tensors if any(part in name for part in _OF_SCALES)]:
            raise UserError(
                f"{self.path} has quantized weights with scales of their own ({found[0]}), which diffusers does not read; take "
                f"the file in bf16, fp16 or plain fp8, and set quantization"
            )


def open_single_file(path: Path) -> SingleFile:
    """The file at a path, opened once, and anew after another has taken its place.

    Raises:
        UserError: See :class:`SingleFile`.
    """
    try:
        stat = path.stat()
    except OSError:
        return SingleFile(path)
    return _opened(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _opened(path: Path, *version: int) -> SingleFile:
    return SingleFile(path)


def _safetensors(path: Path) -> tuple[Callable[[str], Tensor], dict[str, Tensor]]:
    """A function that reads a tensor by its name, and all tensors without their values."""
    try:
        with safe_open(path, framework="pt") as opened:
            shown = {name: opened.get_tensor(name).to("meta") for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is no model: it is no safetensors file, or damaged ({error})") from error
    return TensorReader(path).tensor, shown


def _fitting(path: Path, model: nn.Module, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """A weight of the model's shape."""
    tensor, expected = read(name), model.state_dict()[name].shape
    if tensor.shape != expected:
        raise UserError(
            f"{path} does not fit: {name} is {tuple(tensor.shape)} in it and {tuple(expected)} in the {type(model).__name__}"
        )
    return tensor
