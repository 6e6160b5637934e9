"""Options that trade time or exactness for memory."""

from __future__ import annotations

from dataclasses import dataclass

from lit_lora.argument_types import check_types
from lit_lora.quantization import Quantization


@dataclass(frozen=True)
class MemoryOptions:
    """Options that save memory in a training run; all are off by default.

    Args:
        gradient_checkpointing: Recompute activations in the backward pass, which takes less memory and more time. True for all
            blocks, or a list of glob patterns of the names of blocks, such as ``["up_blocks.*"]``.
        vae_slicing: Encode one image of a batch at a time, so that the VAE keeps the activations of one image only.
        vae_tiling: Encode images that are larger than those the VAE was trained on in overlapping tiles, which changes latents
            slightly.
        offload_encoders: Keep VAE and text encoders in host memory, and move them to the GPU only while they encode.
        offload_blocks: Keep the frozen weights of the denoiser's blocks in host memory, except those of at most two blocks at a
            time.
        offload_folder: Folder on a local disk. The weights that ``offload_blocks`` moves are then in temporary files there, which
            all processes of a machine share, and not in host memory. Defaults to none.
        offload_activations: Keep the activations that the backward pass needs in host memory.
        optimizer_in_backward: Step each parameter as soon as its gradient is complete, then free the gradient. It excludes
            clipping by norm and gradient accumulation, which need all gradients at once.
        text_encoder_quantization: Quantization of the text encoders' Linear and Conv2d weights, such as ``NF4``, in training,
            for samples and in ``lit-lora cache``; defaults to none, so that they are stored in ``base_dtype``. The patterns of
            its ``skip`` begin with the encoder's name in the pipeline, such as ``text_encoder_2.*``.
    """

    gradient_checkpointing: bool | list[str] = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    offload_encoders: bool = False
    offload_blocks: bool = False
    offload_folder: str | None = None
    offload_activations: bool = False
    optimizer_in_backward: bool = False
    text_encoder_quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))

    @property
    def offloads(self) -> tuple[str, ...]:
        """Names of the options that are on and move something to host memory."""
        names = ("offload_encoders", "offload_blocks", "offload_activations")
        return tuple(name for name in names if getattr(self, name))
