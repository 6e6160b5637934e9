"""What a checkpoint records of the run that it was saved in, so that a resumed run can tell what it does otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.adapters import adapter_configs, without_compiling
from lit_lora.adapters.same_config import training_fields
from lit_lora.callbacks.changed_ranks import ChangedRanks
from lit_lora.callbacks.frozen_weights import changed_weights, frozen_weights
from lit_lora.callbacks.lora_injection import LoraInjection
from lit_lora.described import described, described_options, differences
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats.learned_settings import learned_settings

Record = Mapping[str, Mapping[str, str]]
"""Texts by name: ``settings``, ``base`` (identities of its parts) and ``location`` (of the base, for messages); of modules of
other projects ``frozen_sums`` (:func:`~lit_lora.callbacks.frozen_weights.frozen_weights`)."""

_OF_THE_MODEL = ("base_dtype", "quantization", "seed")
"""Options of :class:`~lit_lora.LoraDiffusion` that change what is learned, beside those that are compared elsewhere."""
_OF_THE_MEMORY = ("vae_tiling", "optimizer_in_backward", "text_encoder_quantization")
"""Those of its :class:`~lit_lora.memory.options.MemoryOptions`; the others change rounding at most."""
_OF_RESULTS = (
    "model.objective",
    "model.family",
    "model.base_dtype",
    "model.quantization",
    "model.memory.vae_tiling",
    "model.memory.text_encoder_quantization",
    "quantization of",
    "the base's scheduler",
)
"""Beginnings of settings on which also losses and images of a trained adapter depend."""


def run_record(trainer: Trainer, module: LightningModule) -> Record:
    """The record of a run that has begun, in all but the first process without the base; a collective call.

    Args:
        trainer: Trainer of the run.
        module: Its module with the adapter.
    """
    record = {"settings": dict(_settings(trainer, module)), "base": {}, "location": {}}
    family = getattr(module, "family", None)
    if isinstance(family, ModelFamily) and trainer.is_global_zero:
        with suppress(UserError):  # of parts that are not there, since their outputs are cached
            record |= {"base": family.base_identity(), "location": {"base": str(family.source)}}
    elif not isinstance(family, ModelFamily):
        record["frozen_sums"] = frozen_weights(module, reads_full=trainer.is_global_zero)
    return record


def saved_record(checkpoint: Mapping[str, Any]) -> Record:
    """The record in a checkpoint; empty if it has none.

    Weights that the checkpoint holds itself, such as those of layers that were unfrozen later, are not compared.
    """
    record: Record = checkpoint.get("lit_lora", {}).get("run", {})
    held = {without_compiling(name) for name in checkpoint.get("state_dict", {})}
    frozen = record.get("frozen_sums", {})
    return {**record, "frozen_sums": {name: "" if name in held else text for name, text in frozen.items()}}


def of_results(record: Record) -> Record:
    """The part of a record that validation, test and prediction have in common with the training of their checkpoint.

    Args:
        record: Record in the checkpoint; empty if it has none.
    """
    settings = {name: text for name, text in record.get("settings", {}).items() if name.startswith(_OF_RESULTS)}
    return {**record, "settings": settings}


def warn_of_changes(saved: Record, here: Record) -> None:
    """Warn of settings and of parts of the base that are others than those of a checkpoint.

    Args:
        saved: Record in the checkpoint; empty if it has none.
        here: Record of this run. What only one of them names is not compared.
    """
    places = [record.get("location", {}).get("base", "") for record in (saved, here)]
    changed = [
        f"the base's {part} {places[0]} ({before}) in the checkpoint, {places[1]} ({now}) here"
        for part, before, now in differences(saved.get("base", {}), here.get("base", {}))
    ]
    changed += changed_weights(saved.get("frozen_sums", {}), here.get("frozen_sums", {}))
    changed += [
        f"{name} {before} in the checkpoint, {now} here"
        for name, before, now in differences(saved.get("settings", {}), here.get("settings", {}))
    ]
    if changed:
        rank_zero_warn(
            f"this run is not what the checkpoint was made with: {'; '.join(changed)}. Those of this run apply; set them as they "
            f"were to go on as before"
        )


def _settings(trainer: Trainer, module: Any) -> Iterator[tuple[str, str]]:
    yield "trainer.precision", str(trainer.precision)
    yield "trainer.gradient_clip_val", described(trainer.gradient_clip_val or 0)
    if trainer.gradient_clip_val:
        yield "trainer.gradient_clip_algorithm", str(trainer.gradient_clip_algorithm or "norm")
    yield "trainer.overfit_batches", described(getattr(trainer, "overfit_batches", 0))
    datamodule: Any = getattr(trainer, "datamodule", None)
    batches, processes = trainer.accumulate_grad_batches, trainer.world_size
    # With its factors: the division of the data into batches and dropout's random numbers depend on them, too.
    factors = f"{processes} process{'es' * (processes > 1)} x {batches} batch{'es' * (batches > 1)}"
    if isinstance(size := getattr(datamodule, "batch_size", None), int):
        yield "samples in an optimizer step", f"{size * batches * processes} ({factors} of {size})"
    else:  # the size of a loader's batches is not known yet
        yield "batches in an optimizer step", f"{batches * processes} ({factors})"
    if hasattr(datamodule, "resolution"):
        yield "data.resolution", described(datamodule.resolution)
    chunks = getattr(datamodule, "chunks", None)
    for name in ("passes", "steps"):  # the chunks themselves are a part of the position in the data
        if hasattr(chunks, name):
            yield f"data.chunks.{name}", described(getattr(chunks, name))
    if isinstance(digest := getattr(datamodule, "validation_digest", None), str) and digest:
        yield "validation samples, on which best scores and early stopping depend,", digest
    if hasattr(datamodule, "decoder"):  # the position in the data has checks of its own
        yield "data.decoder", type(datamodule.decoder).__name__
        for name, text in described_options(datamodule.decoder):
            if not name.startswith("_"):
                yield f"data.decoder.{name}", text
    if getattr(datamodule, "train_sets", None):
        yield "data.train_sets", described(datamodule.train_sets)
    if isinstance(getattr(module, "family", None), ModelFamily):
        for name in _OF_THE_MODEL:
            yield f"model.{name}", described(getattr(module, name))
        for name in _OF_THE_MEMORY:
            yield f"model.memory.{name}", described(getattr(module.memory, name))
        yield from learned_settings(module).items()
        for name, value in module.family.scheduler_config.items():
            if not name.startswith("_"):
                yield f"the base's scheduler.{name}", described(value)
    for path, config in adapter_configs(module).items():
        for name, value in training_fields(config).items():
            yield f"{name} of {path}", described(value)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ChangedRanks):
            for name, text in described_options(callback):
                yield f"{name} of {type(callback).__name__}", text
        elif isinstance(callback, LoraInjection):
            for name in ("quantization", "update_statistics"):
                yield f"{name} of LoraInjection", described(getattr(callback, name))
        elif isinstance(callback, GradientAccumulationScheduler):
            yield "scheduling of GradientAccumulationScheduler", described(callback.scheduling)
