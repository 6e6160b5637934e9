"""What a run of ``lit-lora train`` learns from: one folder of images, or several sets, packed into shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lit_lora.datamodules.packing.pack import PackSummary, pack_folder
from lit_lora.datamodules.packing.pack_sets import PackedSets, pack_sets
from lit_lora.datamodules.packing.source_sets import SourceSets
from lit_lora.datamodules.packing.splits import validation_folder
from lit_lora.tools.shards import sets_lines
from lit_lora.tools.training.base import Base
from lit_lora.tools.training.captions import PROMPTS, CaptionRule, prompts_for
from lit_lora.tools.training.choices import Choice
from lit_lora.tools.training.edit_prompts import write_edit_prompts
from lit_lora.tools.training.images import Images
from lit_lora.tools.training.request import PACKED, Request
from lit_lora.tools.training.screen import packed_lines
from lit_lora.tools.training.sources import can_be_cached, keys_of, train_sets, uncached_choice
from lit_lora.visible import visible

_HELD_OUT = "data.init_args.val_samples"


class TrainingData(ABC):
    """The images of a run, in the run's folder: their shards, and caches of these.

    Validation images that have a folder of their own are packed apart, unless the command says how many images are held out.

    Args:
        request: What the command asks for.
        base: Base of the run.
        out: Folder of the run.
        rule: Where captions come from.
    """

    argument: ClassVar[str]
    """The datamodule's argument for what is trained on."""

    def __init__(self, request: Request, base: Base, out: Path, rule: CaptionRule) -> None:
        self.rule = rule
        self._request = request
        self._base = base
        self._out = out
        self._shards, self._validation_shards = (out / name for name in PACKED)
        self._cache, self._validation_cache = out / "cache", out / "cache-validation"
        self._splits = _HELD_OUT not in request.given
        self._packing: dict[str, Any] = {
            "captions": rule.template,
            "fallback": rule.fallback,
            "max_bad": request.max_bad,
        }

    @abstractmethod
    def pack(self) -> list[str]:
        """Pack what is not packed yet, and return lines that tell what there is."""

    @property
    @abstractmethod
    def cached(self) -> bool:
        """Whether the run reads from a cache."""

    @property
    @abstractmethod
    def images(self) -> Images:
        """The packed images to learn from, without class images."""

    @property
    @abstractmethod
    def _learned(self) -> list[str]:
        """Folders of the shards of these images."""

    @property
    @abstractmethod
    def _held_out(self) -> dict[Path, Path]:
        """Shards of validation images of their own folders, by the folder of their cache."""

    @property
    @abstractmethod
    def _caches(self) -> list[Path]:
        """Folders of the caches of the shards to train on."""

    @abstractmethod
    def _training(self, cached: bool) -> Any:
        """The value of :attr:`argument`, of the shards or of their caches."""

    @abstractmethod
    def _validation(self) -> tuple[int, str]:
        """Number of validation images of their own folders, and where they are from."""

    @property
    def shards(self) -> dict[str, Any]:
        """Shards of the run, or the caches in their place, by the datamodule's arguments."""
        validation = [str(cache if self.cached else shards) for cache, shards in self._held_out.items()]
        beside = {"val_shards": validation if len(validation) > 1 else validation[0]} if validation else {}
        return {self.argument: self._training(self.cached), **beside}

    def to_encode(self) -> list[tuple[str, Any, Path]]:
        """What a cache is made of: the datamodule's argument for its shards, their value, and the folder of the cache."""
        held_out = [("val_shards", str(shards), cache) for cache, shards in self._held_out.items()]
        return [(self.argument, self._training(cached=False), self._cache), *held_out]

    @property
    def has_cache(self) -> bool:
        """Whether everything is encoded."""
        return all((folder / "cache.json").exists() for folder in (*self._caches, *self._held_out))

    @property
    def keys(self) -> dict[str, Any]:
        """Values for keys of the config that follow from the images, such as those of a ``dataset.toml``."""
        return {_HELD_OUT: 0} if self._held_out else {}

    @cached_property
    def prompts(self) -> list[str]:
        """Prompts of the images that are drawn while training; of editing pairs, a file of them with their sources."""
        if self._base.takes_sources:
            file = write_edit_prompts(self._learned, self._out / "prompts", self.rule.prefix, PROMPTS)
            if file is not None:
                return [str(file)]
        return prompts_for(self.images.captions, self.rule.prefix)

    def choices(self, chosen: Sequence[Choice]) -> list[Choice]:
        """The choices of a run, with what the data say: captions, and images of a folder of their own for validation."""
        if self._held_out:
            count, reason = self._validation()
            said = {"value": f"{len(self.images):,} + {count:,}", "why": f"{reason} are for validation"}
            chosen = [one._replace(**said) if one.name == "images" else one for one in chosen]
        return [self.rule.choice, *chosen]

    @property
    def uncached(self) -> Choice | None:
        """Why images that were to be cached are not; None if they are."""
        return None


class OneFolder(TrainingData):
    """The images of one folder, or of what else can be packed; also of ``train`` and ``validation`` folders in it."""

    argument = "train_shards"

    def __init__(self, request: Request, base: Base, out: Path, rule: CaptionRule) -> None:
        super().__init__(request, base, out, rule)
        self._folder = request.folders[0]
        self._apart = validation_folder(self._folder) if self._splits else None

    def pack(self) -> list[str]:
        lines = packed_lines("packed", self._pack(self._folder, self._shards), self._apart)
        return lines if self._apart_packed is None else [*lines, *packed_lines("validate", self._apart_packed)]

    @property
    def cached(self) -> bool:
        return self._request.cache

    @cached_property
    def images(self) -> Images:
        return Images.of(*self._learned)

    @property
    def _learned(self) -> list[str]:
        return [str(self._shards)]

    @property
    def _held_out(self) -> dict[Path, Path]:
        return {} if self._apart is None else {self._validation_cache: self._validation_shards}

    @property
    def _caches(self) -> list[Path]:
        return [self._cache]

    def _training(self, cached: bool) -> Any:
        return str(self._cache if cached else self._shards)

    def _validation(self) -> tuple[int, str]:
        assert self._apart is not None
        assert self._apart_packed is not None
        return self._apart_packed.samples, f"those of the folder {visible(self._apart.name)}"

    @cached_property
    def _apart_packed(self) -> PackSummary | None:
        """The validation images, packed; None if they have no folder of their own."""
        return None if self._apart is None else self._pack(self._apart, self._validation_shards)

    def _pack(self, folder: Path, shards: Path) -> PackSummary:
        options = dict(self._packing)
        if self._request.sources is not None:
            options["sources"] = self._request.source_folders[0] / folder.relative_to(self._folder)
        return pack_folder(folder, shards, **options)


class SeveralSets(TrainingData):
    """Several sets of images.

    Args:
        request: What the command asks for.
        base: Base of the run.
        out: Folder of the run.
        rule: Where captions come from.
        sets: The sets.
    """

    argument = "train_sets"

    def __init__(self, request: Request, base: Base, out: Path, rule: CaptionRule, sets: SourceSets) -> None:
        super().__init__(request, base, out, rule)
        self._sets = sets

    def pack(self) -> list[str]:
        return sets_lines(self._packed)

    @property
    def cached(self) -> bool:
        return self._request.cache and can_be_cached(self._packed)

    @cached_property
    def images(self) -> Images:
        sets = zip(self._packed.options["train_sets"], self._packed.summaries, strict=True)
        return Images.of(*self._learned, samples=sum(one["repeats"] * summary.samples for one, summary in sets))

    @property
    def keys(self) -> dict[str, Any]:
        return super().keys | keys_of(self._packed, self._base.template)

    @property
    def uncached(self) -> Choice | None:
        return uncached_choice(self._packed) if self._request.cache else None

    @cached_property
    def _packed(self) -> PackedSets:
        return pack_sets(self._sets, self._shards, validation=self._splits, **self._packing)

    @property
    def _learned(self) -> list[str]:
        return [one["shards"] for one in self._packed.options["train_sets"] if not one.get("prior")]

    @property
    def _held_out(self) -> dict[Path, Path]:
        return {self._validation_cache / name: one.folder for name, one in self._packed.held_out.items()}

    @property
    def _caches(self) -> list[Path]:
        return [self._cache / str(number) for number in range(len(self._sets.sets))]

    def _training(self, cached: bool) -> Any:
        return train_sets(self._packed, self.rule.prefix, self._cache if cached else None)

    def _validation(self) -> tuple[int, str]:
        found = self._packed.held_out.values()
        return sum(one.samples for one in found), f"those of {len(found)} sets' own folders"
