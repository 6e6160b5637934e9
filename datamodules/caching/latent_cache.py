"""The description of a cache of latents and text embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.errors import UserError
from lit_lora.files import atomic_file

DESCRIPTION = "cache.json"
"""Name of the file beside the shards of a cache that describes it."""

EMPTY = "empty.safetensors"
"""Name of the file with the embeddings of one empty caption, if text is cached."""

_SHOWN = 60


def size_name(height: int, width: int) -> str:
    """The name of an image size in a description: ``512x768``, height first."""
    return f"{height}x{width}"


_FORMAT = {"format": "lit_lora.cache", "version": 2}


@dataclass(frozen=True)
class CacheDescription:
    """The models and options with which a cache was made; saved in its ``cache.json``.

    Attributes:
        vae: Identity of the VAE, see :meth:`lit_lora.families.ModelFamily.identity`.
        resolution: Resolution of the datamodule, in pixels.
        buckets: Options of its aspect ratio buckets; None for squares.
        center_crop: Whether images were cropped at the center. Random crops cannot be cached.
        flipped: Whether the cache also has the flipped images.
        dtype: Name of the latents' dtype.
        latent_shapes: Shape of the latents for each image size, by :func:`size_name`.
        encoders: Identity of the text encoders; None if text is not cached.
        captions: :meth:`~lit_lora.datamodules.decoding.captions.Captions.description` of the captions; None if text is not
            cached.
        text_masks: Name of the mask for each text embedding that is stored without padding, see
            :attr:`lit_lora.families.ModelFamily.text_masks`.
        mask: Where the masks of the loss were, see :class:`~lit_lora.datamodules.decoding.image_decoder.ImageDecoder`; None if
            they are not cached.
        text_quantization: Quantization of the text encoders with its options; None if they were not quantized.
        pairs: Whether samples are editing pairs, so that latents of source images are cached too.
        background: Color behind transparent parts of images; None for the files' own.
        vae_tiling: Whether the VAE encoded large images in tiles, which changes their latents slightly.
        base_dtype: Name of the base's dtype, in which the encoders computed; None if only a VAE with a dtype of its own did.
    """

    vae: str
    resolution: int
    buckets: Mapping[str, Any] | None
    center_crop: bool
    flipped: bool
    dtype: str
    latent_shapes: Mapping[str, Sequence[int]]
    encoders: str | None = None
    captions: Mapping[str, Any] | None = None
    text_masks: Mapping[str, str] = field(default_factory=dict)
    mask: str | None = None
    text_quantization: str | None = None
    pairs: bool = False
    background: str | None = None
    vae_tiling: bool = False
    base_dtype: str | None = None

    @property
    def cached(self) -> frozenset[str]:
        """The parts of a batch that the cache holds: ``"latents"``, and ``"text"`` if it is cached."""
        return frozenset({"latents"} if self.encoders is None else {"latents", "text"})

    @classmethod
    def read(cls, folder: str | Path, name: str = DESCRIPTION) -> CacheDescription:
        """Read the description of the cache in a folder.

        Raises:
            UserError: If the description is missing or cannot be read.
        """
        path = Path(folder) / name
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; name the folder of a cache") from error

    @classmethod
    def parse(cls, data: bytes, name: str) -> CacheDescription:
        """Parse the content of a ``cache.json``.

        Args:
            data: Content of the file.
            name: Name of the file, for messages.

        Raises:
            UserError: If it is not a description of this version.
        """
        try:
            document = json.loads(data)
            found = {key: document[key] for key in _FORMAT}
            if found != _FORMAT:
                raise UserError(
                    f"{name} has format {found['format']!r}, version {found['version']!r}, not {_FORMAT['format']!r},"
                    f" version {_FORMAT['version']}; make the cache anew"
                )
            return cls(**document["latents"], **(document["text"] or {}))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{name} is not a description of a cache ({error!r}); make the cache anew") from error

    def write(self, folder: str | Path, name: str = DESCRIPTION) -> None:
        """Write the description to a folder."""
        with atomic_file(Path(folder) / name) as part:
            part.write_text(json.dumps(self._document(), indent=2) + "\n", encoding="utf-8")

    def checksum(self) -> str:
        """A checksum of the description without what is not set, so that fields of later versions do not change it."""
        parts = {name: part for name, part in self._document().items() if isinstance(part, dict)}
        stated = {name: {key: value for key, value in part.items() if value} for name, part in parts.items()}
        text = json.dumps(stated, sort_keys=True)
        return "blake2b:" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def differences(self, other: CacheDescription) -> list[str]:
        """The fields in which ``other`` differs, each with both values; an empty list if the descriptions are equal."""
        return list(_differences(self._document(), other._document()))

    def check(
        self,
        folder: str | Path,
        *,
        identity: Mapping[str, str] | None,
        resolution: int,
        buckets: Mapping[str, Any] | None,
        center_crop: bool,
        random_flip: bool,
        captions: Captions,
        mask: str | None = None,
        pairs: bool = False,
        background: str | None = None,
    ) -> None:
        """Check that the cache holds what a run would encode itself.

        Args:
            folder: Folder of the cache, for the message.
            identity: Result of the module's ``cache_identity()``; parts that it lacks are not compared.
            resolution: Resolution of the run, in pixels.
            buckets: Options of the run's aspect ratio buckets; None for squares.
            center_crop: Whether the run crops images at the center.
            random_flip: Whether the run flips images; if it does, the cache must have the flipped images.
            captions: Captions of the run, which are compared if text is cached.
            mask: Where the masks of the run are; if it has any, the cache must have been made with them. Defaults to None.
            pairs: Whether the run trains on editing pairs, for which the cache must have been made. Defaults to False.
            background: Color behind transparent parts of the run's images. Defaults to None: the files' own.

        Raises:
            UserError: If anything differs; the message lists every difference.
        """
        identity = identity or {}
        wanted = replace(
            self,
            vae=identity.get("vae", self.vae),
            resolution=resolution,
            buckets=buckets,
            center_crop=center_crop,
            flipped=self.flipped or random_flip,
            mask=mask or self.mask,
            pairs=pairs,
            background=background,
        )
        if self.encoders is not None:
            encoders = identity.get("text", self.encoders)
            wanted = replace(wanted, encoders=encoders, captions=captions.description())
        if self.encoders is not None and "text" in identity:
            wanted = replace(wanted, text_quantization=identity.get("text_quantization"))
        if differences := self.differences(wanted):
            raise UserError(
                f"the cache in {folder} does not match this run:\n  "
                + "\n  ".join(differences)
                + "\nrestore these values, or make the cache anew: lit-lora cache --config … --out …"
            )

    def _document(self) -> dict[str, Any]:
        """The description as JSON values, in which tuples become lists."""
        latents = {
            "vae": self.vae,
            "resolution": self.resolution,
            "buckets": self.buckets,
            "center_crop": self.center_crop,
            "flipped": self.flipped,
            "dtype": self.dtype,
            "latent_shapes": self.latent_shapes,
            "mask": self.mask,
            "pairs": self.pairs,
            "background": self.background,
            "vae_tiling": self.vae_tiling,
            "base_dtype": self.base_dtype,
        }
        text = (
            None
            if self.encoders is None
            else {
                "encoders": self.encoders,
                "captions": self.captions,
                "text_masks": self.text_masks,
                "text_quantization": self.text_quantization,
            }
        )
        document: dict[str, Any] = json.loads(json.dumps(_FORMAT | {"latents": latents, "text": text}))
        return document


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """Compare nested JSON values; entries are named by dotted paths."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = [(key, ours.get(key), theirs.get(key)) for key in dict.fromkeys([*ours, *theirs])]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(ours, theirs, strict=True))]
    else:
        if ours != theirs:
            yield f"{name}: {_shown(ours)} in the cache, {_shown(theirs)} here"
        return
    for key, our, their in pairs:
        yield from _differences(our, their, f"{name}.{key}" if name else key)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
