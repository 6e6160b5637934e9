"""The cache that a run reads from, and the decoder for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.datamodules.batches.buckets import AspectRatioBuckets
from lit_lora.datamodules.caching.cached_decoder import CachedDecoder
from lit_lora.datamodules.caching.open_cache import OpenCache, open_cache
from lit_lora.datamodules.decoding.edit_decoder import EditDecoder
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.table import SampleTable


def is_cacheable(decoder: SampleDecoder) -> TypeGuard[ImageDecoder]:
    """Whether what a decoder makes can be cached: of others, also of subclasses, nobody knows what they make."""
    return type(decoder) in (ImageDecoder, EditDecoder)


def cache_of_run(
    table: SampleTable,
    decoder: SampleDecoder,
    identity: Mapping[str, str],
    resolution: int,
    buckets: AspectRatioBuckets | None,
) -> OpenCache | None:
    """The cache to which a table's shards belong, after checking that it holds what the run would encode; None for images.

    A custom decoder, also a subclass of ``ImageDecoder`` that is not the package's, reads the members of a cache as they are.

    Args:
        table: Samples of the run.
        decoder: Decoder of the run for these samples.
        identity: Result of the module's ``cache_identity()``; empty without a module.
        resolution: Resolution of the run, in pixels.
        buckets: Aspect ratio buckets of the run; None for squares.

    Raises:
        UserError: If the shards belong to several caches, or to one that holds something else.
    """
    if not is_cacheable(decoder):
        return None
    cache = open_cache(table)
    if cache is not None:
        cache.description.check(
            cache.folder,
            identity=identity,
            resolution=resolution,
            buckets=None if buckets is None else buckets.description(),
            center_crop=decoder.center_crop,
            random_flip=decoder.random_flip,
            captions=decoder.captions,
            mask=decoder.mask,
            pairs=decoder.pairs,
            background=decoder.background,
        )
        _warn_of_options(cache, identity)
    return cache


def decoder_of_run(decoder: SampleDecoder, cache: OpenCache | None, seed: int) -> SampleDecoder:
    """The given decoder with the run's seed, or if samples are in a cache, one that reads the same entries from it.

    Args:
        decoder: Decoder of the run.
        cache: Result of :func:`cache_of_run`.
        seed: Seed of the run.
    """
    decoder = decoder.with_seed(seed)
    if cache is None:
        return decoder
    assert isinstance(decoder, ImageDecoder), "only image decoders read a cache"
    masked = decoder.mask is not None
    return CachedDecoder(cache.description, decoder.framing, decoder.captions, cache.empty, masked)


def _warn_of_options(cache: OpenCache, identity: Mapping[str, str]) -> None:
    """Tell of options with which the run's encoders would compute slightly other values; they are no reason to refuse a cache.

    Tiles change the latents of large images alone, and the run may set them for the images that it draws. In another dtype the
    outputs of the same encoders are rounded otherwise.
    """
    tiles = "vae_tiling" in identity
    if "vae" in identity and tiles is not cache.description.vae_tiling:
        _warn_of_difference(
            cache,
            f"{'without' if tiles else 'with'} model.memory.vae_tiling, which is {str(tiles).lower()} here: latents of images "
            f"larger than the VAE's tiles differ slightly from those",
        )
    made, here = cache.description.base_dtype, identity.get("base_dtype")
    if made and here and made != here:
        _warn_of_difference(
            cache,
            f"with model.base_dtype {made}, which is {here} here: its latents and text embeddings are rounded otherwise than "
            f"those",
        )


def _warn_of_difference(cache: OpenCache, difference: str) -> None:
    rank_zero_warn(
        f"the cache in {cache.folder} was made {difference} that this run would encode; it trains on those of the cache. To "
        f"train on the others, make the cache anew: lit-lora cache --out …"
    )
