"""Decoding and encoding of cached samples: latents and text embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lit_lora.datamodules.caching.latent_cache import CacheDescription, size_name
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.decode import BadSampleError, decode_text
from lit_lora.datamodules.decoding.framing import Framing
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.scan import CACHED_EXTENSION

TEXT = "text."
"""Prefix of the names of text embeddings."""

FLIPPED = "_flipped"
"""Suffix of the names of the flipped image's latents."""

MASK = "loss_mask"
SOURCE = "source_latents"
"""Name of the latents of an editing pair's source: the mean of the posterior."""

LATENTS = ("latents_mean", "latents_std")
SIZES = ("original_size", "crop_top_left", "target_size")


class CachedDecoder(SampleDecoder):
    """Decodes the samples of a cache.

    The ``.safetensors`` member of a sample holds the VAE's posterior, ``latents_mean`` and ``latents_std`` (C, h, w); the same
    with the suffix ``_flipped`` for the flipped image, if the cache has it; ``loss_mask`` (1, h, w), also with that suffix, if
    the cache has masks; ``source_latents`` (C, h, w), also with that suffix, if it is one of editing pairs; ``original_size``,
    ``crop_top_left`` and ``target_size``, int64 (2,), height or top first; and ``text.NAME`` for each text embedding, if text is
    cached.

    Args:
        description: Description of the cache.
        framing: Framing of the run, which decides which occurrences are flipped, as without a cache.
        captions: Sources of captions, if text is not cached; otherwise the cache's ``.txt`` members hold the captions.
        empty: Embeddings of one empty caption by name, from the cache's ``empty.safetensors``, if text is cached.
        masked: Whether the run masks its loss; the cache must have the masks. Defaults to False.
    """

    def __init__(
        self,
        description: CacheDescription,
        framing: Framing,
        captions: Captions,
        empty: Mapping[str, Tensor] | None = None,
        masked: bool = False,
    ) -> None:
        self.description = description
        self.framing = framing
        self.captions = captions
        self.empty = dict(empty or {})
        self.masked = masked
        assert bool(self.empty) == ("text" in description.cached), (
            "cached text needs the embeddings of the empty caption"
        )

    @property
    def required(self) -> dict[str, tuple[str, ...]]:
        return {"cached image": (CACHED_EXTENSION,), "caption": ("txt",) if self.empty else self.captions.extensions}

    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        """The entries of one sample in a batch.

        Args:
            members: The sample's members by extension.
            slot: Number of this occurrence of the sample.
            size: Planned height and width, in pixels.
            image_size: Unused.

        Returns:
            ``latents_mean`` and ``latents_std`` (C, h, w); ``original_size``, ``crop_top_left`` and ``target_size``, int64
            (2,); ``caption``; ``text_embeddings``, a dict of tensors, if text is cached; ``source_latents`` (C, h, w), of editing
            pairs; and ``loss_mask``, float32 (1, h, w), if the run masks its loss.

        Raises:
            BadSampleError: If a member is missing or damaged, a tensor is missing or not finite, or the sample was cached at
                another size.
        """
        tensors = _tensors(members)
        side = FLIPPED if self.framing.flips(slot) else ""
        shape, dtype = self._latents(size)
        entries: dict[str, Any] = {name: _tensor(tensors, name + side, shape, dtype) for name in LATENTS}
        if self.description.pairs:
            entries[SOURCE] = _tensor(tensors, SOURCE + side, shape, dtype)
        if self.masked:
            entries[MASK] = _tensor(tensors, MASK + side, (1, *shape[-2:]), torch.float32)
        entries |= {name: _tensor(tensors, name, (2,), torch.int64) for name in SIZES}
        if (cached := tuple(entries["target_size"].tolist())) != size:
            raise BadSampleError(f"the sample was cached with height and width {cached}, not {size}")
        if not self.empty:
            return entries | {"caption": self.captions.draw(members, self.framing.seed, slot)}
        entries["text_embeddings"] = {name: self._embedding(tensors, name) for name in self.empty}
        return entries | {"caption": _text(members)}

    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        shape, dtype = self._latents(size)
        entries: dict[str, Any] = {name: torch.zeros(shape, dtype=dtype) for name in LATENTS}
        entries |= {"original_size": torch.tensor(size), "crop_top_left": torch.tensor((0, 0))}
        entries |= {"target_size": torch.tensor(size), "caption": ""}
        if self.description.pairs:
            entries[SOURCE] = torch.zeros(shape, dtype=dtype)
        if self.masked:
            entries[MASK] = torch.zeros(1, *shape[-2:])
        return entries | ({"text_embeddings": self.empty} if self.empty else {})

    def batch_entries(self) -> dict[str, Any]:
        """Additional entries of each batch: ``empty_text_embeddings``, if text is cached."""
        return {"empty_text_embeddings": self.empty} if self.empty else {}

    def _embedding(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        """A text embedding of full length, with zeros for the padding that was not stored."""
        empty, masks = self.empty[name], self.description.text_masks
        if name not in masks and name not in masks.values():
            return _tensor(tensors, TEXT + name, tuple(empty.shape), empty.dtype)
        tokens = min(len(tensors.get(TEXT + name, empty)), len(empty))
        stored = _tensor(tensors, TEXT + name, (tokens, *empty.shape[1:]), empty.dtype)
        padded = torch.zeros_like(empty)
        padded[:tokens] = stored
        return padded

    def _latents(self, size: tuple[int, int]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the latents of an image."""
        shape = tuple(self.description.latent_shapes[size_name(*size)])
        return shape, getattr(torch, self.description.dtype)


def without_padding(text: Mapping[str, Tensor], masks: Mapping[str, str]) -> dict[str, Tensor]:
    """Remove the padding from the embeddings of one caption that have a mask, and from the masks.

    Args:
        text: Embeddings by name, ``(tokens, …)`` if they have a mask.
        masks: Name of the mask, ``(tokens,)``, of each embedding that has one.
    """
    kept = dict(text)
    lengths = {mask: _tokens(text[mask]) for mask in set(masks.values())}
    for name, mask in [*masks.items(), *((mask, mask) for mask in lengths)]:
        kept[name] = text[name][: lengths[mask]]
    return kept


def _tokens(mask: Tensor) -> int:
    """Number of tokens up to the last one in the mask, at least 1."""
    counting = mask.nonzero()
    return int(counting.max()) + 1 if len(counting) else 1


def encode_cached(tensors: Mapping[str, Tensor], text: Mapping[str, Tensor], width: int, height: int) -> bytes:
    """Encode the ``.safetensors`` member of a sample; equal values give equal bytes.

    Args:
        tensors: Latents and sizes, see :class:`CachedDecoder`.
        text: Embeddings by name; empty if text is not cached.
        width: Width of the image after the rotation by EXIF, in pixels.
        height: Height of the image, in the same way.

    Raises:
        BadSampleError: If a value is not finite.
    """
    every = {**tensors, **{TEXT + name: embedding for name, embedding in text.items()}}
    for name, tensor in every.items():
        _check_finite(name, tensor)
    metadata = {"format": "lit_lora.cached_sample", "height": str(height), "width": str(width)}
    every = {name: tensor.contiguous().cpu() for name, tensor in every.items()}
    return _with_sorted_header(save(every, metadata))


def _with_sorted_header(data: bytes) -> bytes:
    """Sort the metadata, which safetensors writes in random order."""
    start = 8
    end = start + int.from_bytes(data[:start], "little")
    header = json.loads(data[start:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    return data[:start] + text.ljust(end - start) + data[end:]


def _tensors(members: Mapping[str, bytes]) -> dict[str, Tensor]:
    if CACHED_EXTENSION not in members:
        raise BadSampleError(f"the cached sample has no .{CACHED_EXTENSION} member")
    try:
        return load(members[CACHED_EXTENSION])
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadSampleError(f"the cached tensors cannot be read ({error})") from error


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if name not in tensors:
        raise BadSampleError(f"the cached tensor {name} is missing")
    tensor = tensors[name]
    if tensor.shape != shape or tensor.dtype != dtype:
        raise BadSampleError(
            f"the cached tensor {name} is {_type(tensor.dtype, tensor.shape)}, not {_type(dtype, shape)}"
        )
    _check_finite(name, tensor)
    return tensor


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise BadSampleError(f"the cached tensor {name} has values that are not finite")


def types_of(tensors: Mapping[str, Tensor]) -> str:
    """Names, dtypes and shapes of tensors, for messages and comparisons."""
    return ", ".join(f"{name} {_type(value.dtype, value.shape)}" for name, value in sorted(tensors.items()))


def _type(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _text(members: Mapping[str, bytes]) -> str:
    if "txt" not in members:
        raise BadSampleError("the cached sample has no .txt member")
    return decode_text(members["txt"])
