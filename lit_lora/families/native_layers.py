"""Names of a denoiser's layers in the code that its weights were published with, which kohya's scripts and ComfyUI use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NativeLayer:
    """A layer of the original code, and the layers of diffusers' model that it is made of.

    Args:
        name: Name in the original code, such as ``double_blocks.0.img_attn.qkv``.
        parts: Names of diffusers' layers, whose outputs in this order are the original layer's outputs.
        sizes: Relative numbers of the parts' outputs; defaults to equal ones.
        swapped: Whether the outputs are shift and scale in one code and scale and shift in the other, if there are two of them;
            defaults to False.
    """

    name: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    swapped: bool = False

    @property
    def shares(self) -> tuple[int, ...]:
        """Relative numbers of outputs of each part."""
        return self.sizes or (1,) * len(self.parts)


def single_layers(names: Mapping[str, str], part: str = "", native: str = "") -> Iterator[NativeLayer]:
    """Layers that are the same in both codes.

    Args:
        names: Names in diffusers and in the original code.
        part: Beginning of all names in diffusers; defaults to none.
        native: Beginning of all names in the original code; defaults to none.
    """
    for of_diffusers, original in names.items():
        yield NativeLayer(native + original, (part + of_diffusers,))


_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = [f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}

UNET_NAMING = ("layers_per_block", "down_block_types", "up_block_types", "transformer_layers_per_block")
"""Entries of a UNet's config on which the original names depend."""


def unet_layers(config: Mapping[str, Any]) -> Iterator[NativeLayer]:
    """The layers of a UNet of Stable Diffusion's kind, which CompVis' code calls ``input_blocks``, ``output_blocks`` and so on.

    Args:
        config: Config of the UNet with all of ``UNET_NAMING``.
    """
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    counts = _per_block(config["layers_per_block"], len(down))
    depths = _per_block(config["transformer_layers_per_block"], len(down))
    yield from single_layers(_ENDS)
    block = 1
    for i, (kind, count, depth) in enumerate(zip(down, counts, depths, strict=True)):
        for j in range(count):
            yield from single_layers(_RESNET, f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{block}.0.")
            if "CrossAttn" in kind:
                yield from _transformer(f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{block}.1.", depth)
            block += 1
        if i < len(down) - 1:
            yield NativeLayer(f"input_blocks.{block}.0.op", (f"down_blocks.{i}.downsamplers.0.conv",))
            block += 1
    for j, place in enumerate((0, 2)):
        yield from single_layers(_RESNET, f"mid_block.resnets.{j}.", f"middle_block.{place}.")
    yield from _transformer("mid_block.attentions.0.", "middle_block.1.", depths[-1])
    block = 0
    for i, (kind, count, depth) in enumerate(zip(up, reversed(counts), reversed(depths), strict=True)):
        attends = "CrossAttn" in kind
        for j in range(count + 1):
            yield from single_layers(_RESNET, f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{block}.0.")
            if attends:
                yield from _transformer(f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{block}.1.", depth)
            block += 1
        if i < len(up) - 1:
            last = f"output_blocks.{block - 1}.{2 if attends else 1}.conv"
            yield NativeLayer(last, (f"up_blocks.{i}.upsamplers.0.conv",))


def _transformer(part: str, native: str, depth: int) -> Iterator[NativeLayer]:
    names = ["proj_in", "proj_out"]
    for k in range(depth):
        names += [f"transformer_blocks.{k}.{name}" for name in (*_ATTENTION, "ff.net.0.proj", "ff.net.2")]
    yield from single_layers(dict(zip(names, names, strict=True)), part, native)


def _per_block(value: int | Sequence[int], blocks: int) -> list[int]:
    return [value] * blocks if isinstance(value, int) else list(value)
