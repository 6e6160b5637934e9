"""Draws images with a base model and adapters, through the base's model family or its diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import empty_device_cache
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn
from transformers.utils.logging import disable_progress_bar

import lit_lora
from lit_lora.adapters import load_adapter
from lit_lora.adapters.names import tuner_layers
from lit_lora.console import gpu_memory
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, ModelSource, check_edits, family_of_source
from lit_lora.formats import AdapterFiles
from lit_lora.formats.base_adapter import BaseAdapter
from lit_lora.formats.base_adapters import recorded_adapters
from lit_lora.formats.base_options import recorded_options
from lit_lora.formats.base_records import base_records
from lit_lora.formats.find import read_adapter
from lit_lora.formats.known_base import changed_base
from lit_lora.formats.quantized_base import quantized_base, twice
from lit_lora.formats.sampling_scheduler import scheduler_changes
from lit_lora.formats.text_encoders import for_encoder
from lit_lora.prompts import Prompt, images_to_edit
from lit_lora.tools.drawing_base import SAVINGS, DrawingBase, FamilyBase, PipelineBase, Saving, Size
from lit_lora.tools.drawn_image import DrawnImage
from lit_lora.tools.named_family import named_family

_TOLD: dict[Saving, str] = {
    "batches": "a batch of images: they are drawn one at a time",
    "models": "the whole base: its models wait in host memory and take turns there, and images are drawn one at a time",
    "blocks": "the denoiser: its blocks wait in host memory and are copied there in each step, which takes much longer",
}


@dataclass(frozen=True)
class ScaledAdapter:
    """An adapter to draw with.

    Args:
        path: File or folder of the adapter, in any format.
        scale: Factor of its update; 0 draws without it. Defaults to 1.
    """

    path: str
    scale: float = 1.0


class Drawer:
    """Draws with a base, which is loaded once, and with one choice of adapters after another.

    Args:
        base: Folder, hub id or ``embedded``; None for the base that the adapters name.
        family: Name or import path of the base's model family; None for the family of the base's pipeline.
        dtype: Name of the base's dtype.
        device: Device to draw on; None for the first GPU, or for the CPU if there is none.
        sizes: Heights and widths of the images in pixels; None for the model's own.
        base_adapters: Paths of the adapters that the adapter was trained over; defaults to those that it names.
        base_options: Arguments of the family's constructor beside the base, such as ``variant``; of those that are not given or
            None, the adapter names the values of its training.
        scheduler: Class of the scheduler in diffusers; defaults to that of the base, with the adapter's changes.
        edits: Whether prompts have images to edit; defaults to False.

    Raises:
        UserError: If there is no such device.
    """

    def __init__(
        self,
        base: str | None,
        *,
        family: str | None,
        dtype: str,
        device: str | None,
        sizes: Sequence[Size],
        base_adapters: Sequence[str] = (),
        base_options: Mapping[str, str | None] | None = None,
        scheduler: str | None = None,
        edits: bool = False,
    ) -> None:
        disable_progress_bar()  # of transformers, one for each text encoder
        if device is not None:
            _check_device(device)
        self.base, self.scheduler, self._family = base, scheduler, family
        self._dtype = getattr(torch, dtype)
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._sizes, self._base_adapters, self._edits = sizes, base_adapters, edits
        self._given = {name: value for name, value in (base_options or {}).items() if value is not None}
        self._saving: Saving | None = None
        self._used: list[tuple[str, float]] = []
        self._loaded: DrawingBase | None = None
        self._loaded_with: Any = None
        self._adapted: list[PeftModel] = []
        self._changes: dict[str, Any] = {}
        self._identities: dict[Any, dict[str, str]] = {}

    @property
    def family(self) -> ModelFamily | None:
        """The family that draws; None for a base of no known family, and before :meth:`adapt`."""
        return self._loaded.family if isinstance(self._loaded, FamilyBase) else None

    @property
    def scheduler_name(self) -> str:
        """Class of the scheduler that :meth:`draw` draws with."""
        assert self._loaded is not None
        return str(self._scheduler_config()["_class_name"])

    def adapt(self, adapters: Sequence[ScaledAdapter]) -> None:
        """Draw with these adapters together from now on, and with no others.

        Args:
            adapters: The adapters; several ones are merged into the base.

        Raises:
            UserError: If base or adapters cannot be loaded, the adapters name no base or several, do not fit it, have no scale,
                or need different schedulers or options of the base; or the family cannot draw images of these sizes or with this
                scheduler.
        """
        kind = self._kind(self._given) if self.base or self._family else None
        read = [(one, read_adapter(one.path, kind)) for one in adapters]
        self.base = self.base or _base_of([files for _, files in read])
        options = {**(recorded_options(read[0][1].metadata, self.base) if read else {}), **self._given}
        kind = kind or self._kind(options)
        if self._edits:
            check_edits(kind)
        used = [(one, files) for one, files in read if one.scale != 0]
        self._used = [(one.path, one.scale) for one, _ in used]
        schedulers = {one.path: scheduler_changes(files.metadata) for one, files in used}
        _check_same("changes of the base's scheduler", schedulers, "draw them one by one")
        recorded = {one.path: recorded_options(files.metadata, self.base) for one, files in used}
        others = {path: {k: v for k, v in one.items() if k not in self._given} for path, one in recorded.items()}
        _check_same("options of the base", others, "give those to draw with, such as --vae")
        for one, files in used:
            if quantization := quantized_base(files.metadata):
                warnings.warn(twice(one.path, quantization), stacklevel=2)
        merged = [over for one, files in used for over in self._over(one, files, kind)]
        if len(used) > 1:
            merged += [_merged(one, files) for one, files in used]
        self._warn_of_changed_base(used, kind, options)
        self._load(kind, options, tuple(dict.fromkeys(merged)))
        assert self._loaded is not None
        if len(used) == 1:
            self._put_in(*used[0])
        self._changes = next(iter(schedulers.values()), {})
        if self._saving in (None, "batches"):
            self._tried(lambda loaded: loaded.to(self._device), self._loaded.savings[1:])
        elif self._saving == "blocks":
            self._offload_blocks()

    def base_identity(self) -> dict[str, str]:
        """Identities of the parts of the base that was given, which is not loaded for it.

        Raises:
            UserError: If the base cannot be read.
        """
        return self._identity(self._kind(self._given), self._given)

    def draw(self, prompts: Sequence[Prompt], **options: Any) -> list[DrawnImage]:
        """Draw one image for each prompt, with what it is drawn with.

        Args:
            prompts: Prompts with seeds. Their other settings are those of ``options``: see
                :func:`~lit_lora.prompts.prompt_groups`.
            **options: Options of :func:`lit_lora.sampling.generate`.
        """
        scheduler = self._scheduler_config() if self._changes or self.scheduler else None
        options |= images_to_edit(prompts)
        options["negative_prompts"] = [one.negative_prompt or "" for one in prompts]
        texts, seeds = [one.prompt for one in prompts], [one.seed or 0 for one in prompts]
        images: list[Image.Image] = []

        def generate(loaded: DrawingBase) -> None:
            saving: dict[str, Any] = {} if self._saving is None else {"batch_size": 1}
            saving |= {"offload_from": torch.device(self._device)} if self._saving in ("models", "blocks") else {}
            images.extend(loaded.generate(texts, seeds, scheduler, **options | saving))

        assert self._loaded is not None, "adapt comes first"
        while not self._tried(generate, self._loaded.savings[len(prompts) == 1 :]):
            pass
        facts = (self.scheduler_name, str(self.base), self._used, lit_lora.__version__)
        return [DrawnImage(image, prompt, *facts) for image, prompt in zip(images, prompts, strict=True)]

    def _tried(self, use: Callable[[DrawingBase], object], savings: Sequence[Saving]) -> bool:
        """Use the base; false if the GPU's memory was not enough, and the next of the savings has been made.

        Args:
            use: The use.
            savings: Savings that help it, from the cheapest one on.
        """
        assert self._loaded is not None, "adapt comes first"
        further = [one for one in savings if self._saving is None or SAVINGS.index(one) > SAVINGS.index(self._saving)]
        try:
            use(self._loaded)
            return True
        except torch.OutOfMemoryError as error:
            if not further:
                raise UserError(
                    f"{gpu_memory(error)} All that can wait in host memory does; draw smaller images with --height and "
                    f"--width, or on the CPU with --device cpu"
                ) from error
        # Outside of the handler, whose error keeps what was on the GPU.
        self._saving = further[0]
        if self._saving != "batches":
            self._loaded.to("cpu")
        if self._saving == "blocks":
            self._offload_blocks()
        empty_device_cache()
        warnings.warn(f"the GPU's memory does not hold {_TOLD[self._saving]}", stacklevel=3)
        return False

    def _offload_blocks(self) -> None:
        assert self._loaded is not None
        self._loaded.offload_blocks()
        self._loaded_with = None  # other adapters are put into a base whose blocks are where they were loaded

    def _kind(self, options: Mapping[str, str]) -> type[ModelFamily] | None:
        """The family that is asked for, or the one for the base's pipeline; None if there is none."""
        if self._family is not None:
            return named_family(self._family)
        assert self.base is not None
        return family_of_source(ModelSource(self.base, **options))

    def _over(self, one: ScaledAdapter, files: AdapterFiles, kind: type[ModelFamily] | None) -> list[BaseAdapter]:
        """The adapters that an adapter was trained over."""
        over = recorded_adapters(base_records(files.metadata), one.path, self._base_adapters, kind)
        if over and kind is None:
            raise UserError(
                f"{one.path} was trained over other adapters, which are merged into bases of known model families alone; name "
                f"the base's family with --family"
            )
        return over

    def _load(
        self, kind: type[ModelFamily] | None, options: Mapping[str, str], merged: tuple[BaseAdapter, ...]
    ) -> None:
        """Load the base with these adapters merged, unless it is there already, as it was before the adapters of now."""
        wanted = (kind, options, merged)
        for adapted in self._adapted if wanted == self._loaded_with else ():
            adapted.unload()
        self._adapted = []
        if wanted == self._loaded_with:
            return
        self._loaded = None  # so that memory holds one base
        self._loaded = self._opened(kind, options)
        self._loaded.load(self._dtype, merged, self._sizes, self.scheduler)
        self._loaded_with = wanted

    def _warn_of_changed_base(
        self,
        used: Sequence[tuple[ScaledAdapter, AdapterFiles]],
        kind: type[ModelFamily] | None,
        options: Mapping[str, str],
    ) -> None:
        for one, files in used:
            if changed := changed_base(files, str(self.base), lambda: self._identity(kind, options)):
                warnings.warn(
                    f"the base {self.base} is not the one that {one.path} was trained over: another "
                    f"{' and another '.join(changed)}; name the folder of that one with --base",
                    stacklevel=3,
                )

    def _identity(self, kind: type[ModelFamily] | None, options: Mapping[str, str]) -> dict[str, str]:
        """Identities of the base's parts, read from its files once and not for each adapter of a grid."""
        key = self.base, kind, tuple(options.items())
        if key not in self._identities:
            self._identities[key] = self._opened(kind, options).identity()
        return self._identities[key]

    def _opened(self, kind: type[ModelFamily] | None, options: Mapping[str, str]) -> DrawingBase:
        assert self.base is not None
        return FamilyBase(kind, self.base, options) if kind else PipelineBase(self.base, options)

    def _put_in(self, one: ScaledAdapter, adapter: AdapterFiles) -> None:
        """Load an adapter into the parts that it was made for, in place."""
        loaded = self._loaded
        assert loaded is not None
        if adapter.state:
            self._put_part(loaded.denoiser(adapter.config), adapter, one)
        for name, part in adapter.text_encoders.items():
            encoder = loaded.encoders.get(name)
            if not isinstance(encoder, nn.Module):
                raise UserError(
                    f"the adapter {one.path} changes {name}, which the base does not have; set --base to its own base"
                )
            self._put_part(encoder, for_encoder(part, encoder), one)
        if adapter.new_tokens:
            loaded.add_new_tokens(adapter.new_tokens, one.path)
        if adapter.new_tokens or not all(_leaves_base(part.config) for part in adapter.parts.values()):
            self._loaded_with = None  # the next adapters need the base anew

    def _put_part(self, model: nn.Module, part: AdapterFiles, one: ScaledAdapter) -> None:
        adapted = load_adapter(model, part.config, part.state, one.path)
        self._adapted.append(adapted)
        if one.scale == 1:
            return
        layers = [layer for _, layer in tuner_layers(adapted, BaseTunerLayer)]
        if _trains_base(part.config) or not all(_scaled(layer, one.scale) for layer in layers):
            method = part.config.get("peft_type")
            raise UserError(
                f"the update of {one.path} ({method}) has no scale; draw it with the scale 1, or with 0 for the base alone"
            )

    def _scheduler_config(self) -> dict[str, Any]:
        assert self._loaded is not None
        named = {"_class_name": self.scheduler} if self.scheduler else {}
        return {**self._loaded.scheduler_config, **self._changes, **named}


def _check_same(what: str, needs: Mapping[str, Mapping[str, Any]], advice: str) -> None:
    """Refuse adapters that cannot be drawn together, since one would be drawn otherwise than it was trained."""
    first, *others = needs.items() or [("", {})]
    for path, need in others:
        if need != first[1]:
            told = " and ".join(f"{dict(one) or 'none'} for {name}" for name, one in (first, (path, need)))
            raise UserError(f"the adapters need other {what}, {told}; {advice}")


def _base_of(adapters: Sequence[AdapterFiles]) -> str:
    """The base that adapters name."""
    named = list(
        dict.fromkeys(name for files in adapters if (name := files.main_config.get("base_model_name_or_path")))
    )
    if not named:
        raise UserError("give --base: a folder, a hub id or 'embedded' (the adapter does not name its base)")
    if len(named) > 1:
        raise UserError(
            f"the adapters name several bases ({', '.join(map(str, named))}); give the one to draw with as --base"
        )
    return str(named[0])


def _merged(one: ScaledAdapter, files: AdapterFiles) -> BaseAdapter:
    """An adapter as one of several that are merged into the base."""
    if files.new_tokens:
        raise UserError(
            f"the adapter {one.path} has new tokens ({', '.join(files.new_tokens)}), which are not combined with other adapters; "
            f"draw it by itself"
        )
    return BaseAdapter(one.path, one.scale)


def _scaled(layer: Any, scale: float) -> bool:
    """Scale the update of an adapter's layer; returns whether it has a scale: PEFT's layers of some methods only warn."""
    before = dict(getattr(layer, "scaling", {}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Scaling operation for .* not supported")
        if before and hasattr(layer, "scale_layer"):
            layer.scale_layer(scale)
    return bool(before) and (layer.scaling != before or not any(before.values()))


def _trains_base(config: Mapping[str, Any]) -> bool:
    """Whether an adapter also holds weights of the base."""
    return bool(
        config.get("modules_to_save") or config.get("trainable_token_indices") or config.get("bias", "none") != "none"
    )


def _leaves_base(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's layers keep the base's weights as they are, so that without them the base is as before."""
    start = config.get("init_lora_weights", True)  # some first values are taken out of the base's weights
    return (
        config.get("peft_type") in ("LORA", "LOHA", "LOKR")
        and not _trains_base(config)
        and start in (True, False, None, "gaussian")
    )


def _check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device={device!r} cannot be used here ({reason}); use cpu, or leave it out") from error
