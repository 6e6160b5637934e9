"""Runs with options drawn by chance, whole and in parts."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import nn

from lit_lora import (
    AdapterCheckpoint,
    AdapterEMA,
    AspectRatioBuckets,
    BaseAdapter,
    Captions,
    Chunks,
    FiniteGradients,
    ImageDecoder,
    LoraDiffusion,
    MemoryOptions,
    ModelFamily,
    ParameterGroup,
    PriorPreservation,
    RankBudget,
    ScheduleFree,
    ShardSet,
    StepMetrics,
    UserError,
    WebDatasetDataModule,
)
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.tools.cache import cache_shards
from tests.random_options import (
    ADAPTERS,
    FAMILIES,
    FLOW_OBJECTIVES,
    OBJECTIVES,
    OPTIMIZERS,
    SCHEDULES,
    STARTS,
    Options,
)


def runs_and_seed(runs: str, seed: str, usual: int) -> tuple[int, int]:
    """How many runs are drawn, and from which seed: what the environment variables of these names say.

    Without ``runs`` these are the same ``usual`` ones each time, and with it others each time, unless ``seed`` is given.
    """
    new = int.from_bytes(os.urandom(4), "big") if runs in os.environ else 0
    return int(os.environ.get(runs, usual)), int(os.environ.get(seed) or new)


class StopError(Exception):
    """Ends a run as a fault would."""


class Stop(Callback):
    """Ends a run at one of the calls of a hook."""

    def __init__(self, hook: str, calls: int) -> None:
        self._calls = calls
        setattr(self, hook, self._count)

    def _count(self, *_: Any, **__: Any) -> None:
        self._calls -= 1
        if not self._calls:
            raise StopError


HOOKS = [
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


SHOWN = ("key", "slot", "caption", "pixel_values", "latents_mean", "prior")


class Record(Callback):
    """Keeps what each batch of a run gave, and each validation; what is done again replaces what was lost."""

    def __init__(self, seen: dict[str, Any]) -> None:
        self.seen = seen

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        shown = {name: batch[name] for name in SHOWN if name in batch}
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        self.seen[f"batch {number}"] = {"loss": float(outputs["loss"]), "rates": rates, **shown}

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen[f"validation {trainer.global_step}"] = float(trainer.callback_metrics["val/loss"])


def module_of(drawn: Options, base: Path, adapters: Path) -> LoraDiffusion:
    """The module of a run; an adapter that it starts from is in ``adapters``."""
    kind = FAMILIES[drawn.family][0]
    options: dict[str, Any] = {"text_adapter": peft.LoraConfig(r=2)} if drawn.text else {}
    if drawn.tokens:
        options["new_tokens"] = {"<cat>": 2, "<dog>": "red"}
    if drawn.base_adapter:
        options["base_adapters"] = [BaseAdapter(str(adapters), 0.7)]
    if drawn.groups:
        options["parameter_groups"] = [ParameterGroup("*.lora_B.*", lr_ratio=2, weight_decay=0.1)]
    prior = {"prior": PriorPreservation(weight=0.5)} if drawn.prior else {}
    objective = (OBJECTIVES | FLOW_OBJECTIVES)[drawn.objective](**prior) if drawn.objective else None
    return LoraDiffusion(
        kind(str(base)),
        ADAPTERS[drawn.adapter](),
        objective,
        OPTIMIZERS[drawn.optimizer],
        lr_scheduler=SCHEDULES[drawn.schedule] if drawn.schedule else None,
        quantization=drawn.quantization and drawn.quantization(),
        base_dtype=drawn.base_dtype,  # type: ignore[arg-type]
        caption_dropout=drawn.caption_dropout,
        memory=MemoryOptions(**drawn.memory),  # type: ignore[arg-type]
        convolutions=drawn.convolutions,  # type: ignore[arg-type]
        fused_lora=drawn.fused_lora,
        **options,
    )


def data_of(drawn: Options, shards: Path, num_workers: int = 0) -> WebDatasetDataModule:
    """The data of a run."""
    sets = [ShardSet(str(shards / "a")), ShardSet(str(shards / "b"), repeats=2, prior=drawn.prior)]
    return WebDatasetDataModule(
        train_shards=None if drawn.sets else str(shards / "a"),
        train_sets=sets if drawn.sets else None,
        val_shards=str(shards / "b") if drawn.sets and drawn.val_samples else None,
        val_samples=0 if drawn.sets else drawn.val_samples,
        batch_size=drawn.batch_size,
        resolution=16,
        buckets=AspectRatioBuckets(divisor=8) if drawn.buckets else None,
        decoder=ImageDecoder(**drawn.decoder, captions=Captions(shuffle_tags=not drawn.cached)),  # type: ignore[arg-type]
        chunks=Chunks(drawn.chunks),
        num_workers=num_workers,
    )


def write_adapter(base: Path, kind: type[ModelFamily], folder: Path) -> None:
    """Write a LoRA of small random values for the family."""
    module = LoraDiffusion(kind(str(base)), peft.LoraConfig(r=2, target_modules=["to_k"]), base_dtype="float32")
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    module.save_adapter(folder)


def write_shards(
    drawn: Options, base: Path, folder: Path, r: random.Random, encode_image: Callable[..., bytes]
) -> Path:
    """Pack images of several shapes, and cache them if the run reads a cache; the folder that the run reads."""
    for name, count, per_shard in (("a", drawn.images, r.choice([2, 3, 5])), ("b", 5, 3)):
        images = folder / f"images-{name}"
        images.mkdir(parents=True)
        for i in range(count):
            width, height = r.choice([(24, 16), (16, 24), (20, 20), (32, 16)])
            (images / f"{i:02}.png").write_bytes(encode_image(width, height, "PNG", seed=i))
            (images / f"{i:02}.txt").write_text(f"a red {r.choice(['seven', 'star'])}, tag{i % 3}, tag{i % 5}")
        pack_folder(images, folder / name, samples_per_shard=per_shard)
        if drawn.cached:
            data = data_of(drawn, folder)
            data.train_shards, data.train_sets, data.val_shards = str(folder / name), None, None
            out = str(folder / "cache" / name)
            cache_shards(module_of(drawn, base, folder / "adapter"), data, out, text="text" in drawn.cached)
    return folder / "cache" if drawn.cached else folder


def fit(
    drawn: Options,
    base: Path,
    shards: Path,
    folder: Path,
    seen: dict[str, Any],
    trainer_options: dict[str, Any],
    num_workers: int,
    *callbacks: Callback,
) -> None:
    """Train or go on training in a folder."""
    seed_everything(7, verbose=False)
    written = shards.parent if drawn.cached else shards
    module, data = module_of(drawn, base, written / "adapter"), data_of(drawn, shards, num_workers)
    moments = {"every_n_train_steps": drawn.save_every} if drawn.save_every else {"every_n_epochs": 1}
    chosen: dict[str, Any] = {"monitor": "val/loss", "save_top_k": 1} if drawn.monitored else {}
    kept = {"save_top_k": drawn.save_top_k, "save_last": drawn.save_last, "save_on_chunk_end": drawn.on_chunk_end}
    saving = AdapterCheckpoint(folder / "saved", enable_version_counter=False, **moments | kept | chosen)
    own: list[Callback] = [FiniteGradients(), StepMetrics(), Record(seen), saving, *callbacks]
    own += [AdapterEMA(drawn.ema)] if drawn.ema else []
    own += [ScheduleFree()] if drawn.optimizer == "schedule-free" else []
    own += [STARTS[drawn.start]()] if drawn.start else []
    own += [RankBudget(mean_rank=1.5, stop=0.7, prunings=3)] if drawn.budget else []
    batches = drawn.accumulate[0]
    if len(drawn.accumulate) > 1:
        own += [GradientAccumulationScheduler(drawn.accumulate)]
    value, algorithm = drawn.clip
    of_run: dict[str, Any] = {
        "default_root_dir": folder,
        "enable_checkpointing": True,
        "callbacks": own,
        "max_steps": drawn.steps,
        "max_epochs": drawn.epochs,
        "accumulate_grad_batches": batches,
        "gradient_clip_val": value,
        "gradient_clip_algorithm": algorithm if value else None,
        "val_check_interval": drawn.val_every and drawn.val_every * batches,
        "check_val_every_n_epoch": None if drawn.val_every else 1,
        "num_sanity_val_steps": 0,
    }
    trainer = Trainer(**trainer_options | of_run)
    resumes = (folder / "saved" / "last.ckpt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path="last" if resumes else None)


@dataclass
class WholeRun:
    """A run with options drawn by chance that was never stopped.

    Attributes:
        drawn: Its options.
        base: Folder of the base.
        shards: Folder of the images' shards.
        folder: Folder of the run.
        seen: What :class:`Record` kept of it.
    """

    drawn: Options
    base: Path
    shards: Path
    folder: Path
    seen: dict[str, Any]

    @property
    def batches(self) -> int:
        """Number of its batches."""
        return sum(name.startswith("batch") for name in self.seen)


def train_whole(
    r: random.Random,
    called: str,
    change: Callable[[Options], None],
    request: pytest.FixtureRequest,
    encode_image: Callable[..., bytes],
    trainer_options: dict[str, Any],
    folder: Path,
) -> WholeRun:
    """Draw options until they go together, and train with them.

    Args:
        r: What is drawn from.
        called: What is printed before the options.
        change: Changes options that were drawn.
        request: Gives the folder of a family's base.
        encode_image: The fixture.
        trainer_options: Options of the trainer.
        folder: Folder for data and run.
    """
    for trial in range(20):
        drawn, data = Options.draw(r), folder / f"data-{trial}"
        change(drawn)
        print(f"\n{called}: {drawn}")
        kind, fixture = FAMILIES[drawn.family]
        base: Path = request.getfixturevalue(fixture)
        seen: dict[str, Any] = {}
        whole = folder / f"whole-{trial}"
        try:
            if drawn.base_adapter:
                write_adapter(base, kind, data / "adapter")
            shards = write_shards(drawn, base, data, r, encode_image)
            fit(drawn, base, shards, whole, seen, trainer_options, 0)
        except (UserError, MisconfigurationException) as error:  # options that do not go together
            if seen:  # these are refused before the first step
                raise
            print(f"  refused: {error}")
            continue
        return WholeRun(drawn, base, shards, whole, seen)
    pytest.fail("nothing but options that are refused")


def train_in_parts(r: random.Random, whole: WholeRun, folder: Path, trainer_options: dict[str, Any]) -> dict[str, Any]:
    """Train a run again, stopped and resumed at moments drawn by chance, and return what :class:`Record` kept."""
    seen: dict[str, Any] = {}
    options = (whole.drawn, whole.base, whole.shards, folder, seen, trainer_options)
    for _ in range(whole.drawn.stops):
        hook, calls = r.choice(HOOKS), r.randint(1, whole.batches)
        print(f"  stopped at call {calls} of {hook}")
        try:
            fit(*options, r.choice([0, 1, 2]), Stop(hook, calls))
        except StopError:
            continue
        break  # it has ended before
    fit(*options, r.choice([0, 1, 2]))
    return seen


def saved(folder: Path) -> dict[str, Any]:
    """All adapters of a run, and its last checkpoint but for paths and times."""
    files = {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    checkpoints = sorted(path.name for path in (folder / "saved").glob("*.ckpt"))
    checkpoint = torch.load(folder / "saved" / "last.ckpt", weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "WebDatasetDataModule")
    states = {name: checkpoint[name] for name in names} | {"rng": checkpoint["lit_lora"]["rng"]}
    callbacks = {name: state for name, state in checkpoint["callbacks"].items() if "AdapterCheckpoint" not in name}
    return {"files": files, "checkpoints": checkpoints, "states": states, "callbacks": callbacks}
