"""What a cache of latents and text embeddings was made with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.errors import UserError
from lit_lora.files import atomic_file

DESCRIPTION = "cache.json"
"""The file beside the shards of a cache by which it is known as one."""

EMPTY = "empty.safetensors"
"""The file beside it with the embeddings of one empty caption, where text is cached."""

_SHOWN = 60


def size_name(height: int, width: int) -> str:
    """The name of an image size in a description: ``512x768``, height first."""
    return f"{height}x{width}"


_FORMAT = {"format": "lit_lora.cache", "version": 2}


@dataclass(frozen=True)
class CacheDescription:
    """What a cache was made with; kept in its ``cache.json``.

    Attributes:
        vae: The VAE's identity, see :meth:`lit_lora.families.ModelFamily.identity`.
        resolution: The datamodule's, in pixels.
        buckets: The fields of its aspect ratio buckets; None for squares.
        center_crop: Whether the middle was cropped. Random crops cannot be cached.
        flipped: Whether the mirrored image is there too.
        dtype: Of the latents.
        latent_shapes: Shape of the latents for each size of image, by :func:`size_name`.
        encoders: The identity of the text encoders; None where text is not cached.
        captions: :meth:`~lit_lora.datamodules.decoding.captions.Captions.description` of the captions; None where text is
            not cached.
        text_masks: For text embeddings that are stored without their padding, the name of the mask:
            :attr:`lit_lora.families.ModelFamily.text_masks`.
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

    @property
    def cached(self) -> frozenset[str]:
        """What a run over the cache need not encode: ``"latents"``, and ``"text"`` where it is cached."""
        return frozenset({"latents"} if self.encoders is None else {"latents", "text"})

    @classmethod
    def read(cls, folder: str | Path, name: str = DESCRIPTION) -> CacheDescription:
        """The description of the cache in a folder.

        Raises:
            UserError: If there is no description, or it cannot be read.
        """
        path = Path(folder) / name
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; name the folder of a cache") from error

    @classmethod
    def parse(cls, data: bytes, name: str) -> CacheDescription:
        """The description in the bytes of a ``cache.json``.

        Args:
            data: What the file holds.
            name: What to call it in messages.

        Raises:
            UserError: If it is not a description, or one of another version.
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
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{name} is no description of a cache ({error!r}); make the cache anew") from error

    def write(self, folder: str | Path, name: str = DESCRIPTION) -> None:
        """Write the description into a folder."""
        with atomic_file(Path(folder) / name) as part:
            part.write_text(json.dumps(self._document(), indent=2) + "\n", encoding="utf-8")

    def differences(self, other: CacheDescription) -> list[str]:
        """Each field in which ``other`` differs, with both values; none where both describe the same."""
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
    ) -> None:
        """Make sure that a run gets from the cache what it would encode itself.

        Args:
            folder: Where the cache is, for the message.
            identity: What the module's ``cache_identity()`` gives; a part that it does not mention is not compared.
            resolution: The run's, in pixels.
            buckets: The fields of the run's aspect ratio buckets; None for squares.
            center_crop: Whether the run crops the middle.
            random_flip: Whether the run mirrors images; a cache of both sides also serves a run that does not.
            captions: The run's captions; they are compared where text is cached.

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
        )
        if self.encoders is not None:
            encoders = identity.get("text", self.encoders)
            wanted = replace(wanted, encoders=encoders, captions=captions.description())
        if differences := self.differences(wanted):
            raise UserError(
                f"the cache in {folder} was made with something else than this run has:\n  "
                + "\n  ".join(differences)
                + "\nset these values back, or make the cache anew: lit-lora cache --config … --out …"
            )

    def _document(self) -> dict[str, Any]:
        """As JSON has it: tuples become lists."""
        latents = {
            "vae": self.vae,
            "resolution": self.resolution,
            "buckets": self.buckets,
            "center_crop": self.center_crop,
            "flipped": self.flipped,
            "dtype": self.dtype,
            "latent_shapes": self.latent_shapes,
        }
        text = (
            None
            if self.encoders is None
            else {
                "encoders": self.encoders,
                "captions": self.captions,
                "text_masks": self.text_masks,
            }
        )
        document: dict[str, Any] = json.loads(json.dumps(_FORMAT | {"latents": latents, "text": text}))
        return document


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """Compares nested JSON; an entry goes by a dotted name."""
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
