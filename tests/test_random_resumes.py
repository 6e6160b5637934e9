"""Runs with options drawn by chance that are stopped at any moment and resumed end as if nothing had happened.

``LIT_LORA_RESUMES=100 pytest -n 0 -s tests/test_random_resumes.py`` draws 100 runs with a new seed, which is printed and which
``LIT_LORA_RESUME_SEED`` sets. Without it the same few runs are tested each time.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from prodigyopt import Prodigy
from safetensors.torch import load_file
from torch import optim
from torch.optim import lr_scheduler as schedules

from lit_lora import (
    DDPM,
    FP8,
    NF4,
    W8A8,
    AdapterCheckpoint,
    AdapterEMA,
    AspectRatioBuckets,
    Captions,
    Chunks,
    FiniteGradients,
    ImageDecoder,
    Int8,
    LoraDiffusion,
    MemoryOptions,
    MinSNR,
    OffsetNoise,
    PseudoHuber,
    RankBudget,
    ScheduleFree,
    ShardSet,
    StableDiffusion,
    StepMetrics,
    UserError,
    WebDatasetDataModule,
)
from lit_lora.datamodules.packing.pack import pack_folder
from tests.helpers import differences

pytestmark = pytest.mark.slow

RUNS = int(os.environ.get("LIT_LORA_RESUMES", 2))
_NEW = int.from_bytes(os.urandom(4), "big") if "LIT_LORA_RESUMES" in os.environ else 0
SEED = int(os.environ.get("LIT_LORA_RESUME_SEED") or _NEW)

ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]),
    "lora with dropout": lambda: peft.LoraConfig(r=2, target_modules=["to_q", "conv1", "ff.net.2"], lora_dropout=0.3),
    "rank-stabilized": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=["to_q"], rank_pattern={"to_q": 2}),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["to_q", "conv1"]),
    "trained base weights": lambda: peft.LoraConfig(r=4, target_modules=["to_q"], modules_to_save=["conv_in"]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=2, target_modules=["to_q", "conv1"], rank_dropout=0.2),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=2, target_modules=["to_q", "conv1"], module_dropout=0.2),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=2, tfinal=3, total_step=10**9, target_modules=["to_q"]
    ),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["to_q"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["to_q"]),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=["to_q"]),
    "miss": lambda: peft.MissConfig(r=2, target_modules=["to_q"]),
}

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adamw": partial(optim.AdamW, lr=1e-2),
    "fused adamw": partial(optim.AdamW, lr=1e-2, fused=True),
    "sgd": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adafactor": partial(optim.Adafactor, lr=1e-2),
    "radam": partial(optim.RAdam, lr=1e-2),
    "rprop": partial(optim.Rprop, lr=1e-3),
    "prodigy": Prodigy,
    "schedule-free": lambda parameters: _schedule_free(parameters),
}

SCHEDULES: dict[str, Callable[[optim.Optimizer], Any]] = {
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 12),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.02, total_steps=100, cycle_momentum=False),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3, 2),
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ExponentialLR(o, 0.9)]
    ),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.CosineAnnealingLR(o, 9)], [3]
    ),
}

OBJECTIVES: dict[str, Callable[[], DDPM]] = {
    "min-snr": lambda: DDPM(weighting=MinSNR(5.0)),
    "offset noise": lambda: DDPM(noise=[OffsetNoise(0.1)]),
    "v": lambda: DDPM(prediction_type="v_prediction"),
    "huber": lambda: DDPM(criterion=PseudoHuber(), input_perturbation=0.1, timestep_range=(0.1, 0.9)),
}


def _schedule_free(parameters: Any) -> optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(parameters, lr=1e-2, warmup_steps=3)


@dataclass
class Options:
    """What is drawn for one run."""

    adapter: str
    optimizer: str
    schedule: str | None
    objective: str | None
    quantization: Any
    base_dtype: str
    caption_dropout: float
    memory: dict[str, bool]
    text: bool
    tokens: bool
    accumulate: int
    clip: tuple[float | None, str]
    ema: float | None
    budget: bool
    images: int
    batch_size: int
    buckets: bool
    chunks: int
    sets: bool
    val_samples: int
    val_every: int | None
    decoder: dict[str, bool]
    steps: int
    epochs: int
    save_every: int | None
    save_top_k: int
    save_last: Any
    on_chunk_end: bool
    monitored: bool
    stops: int

    @classmethod
    def draw(cls, r: random.Random) -> Options:
        def often(share: float) -> bool:
            return r.random() < share

        in_backward = often(0.15)
        optimizer = r.choice(["adamw", "adamw", *OPTIMIZERS])
        adapter = r.choice(["lora", "lora", *ADAPTERS])
        is_lora = adapter in ("lora", "rank-stabilized")
        averaged = optimizer == "schedule-free"  # by the optimizer itself
        val_samples, chunks = r.choice([0, 2, 3]), r.choice([1, 1, 2, 3])
        return cls(
            adapter=adapter,
            optimizer=optimizer,
            schedule=None if averaged or often(0.3) else r.choice(list(SCHEDULES)),
            objective=r.choice([None, *OBJECTIVES]),
            quantization=r.choice([None, None, Int8, NF4, FP8, W8A8]),
            base_dtype=r.choice(["float32", "bfloat16"]),
            caption_dropout=r.choice([0, 0.5]),
            memory={"gradient_checkpointing": often(0.3), "optimizer_in_backward": in_backward},
            text=often(0.2),
            tokens=often(0.2),
            accumulate=1 if in_backward else r.choice([1, 1, 2, 3]),
            clip=(None if in_backward else r.choice([None, 1.0]), r.choice(["norm", "value"])),
            ema=None if averaged else r.choice([None, 0.9]),
            budget=is_lora and not in_backward and often(0.4),
            images=r.randint(6, 20),
            batch_size=r.choice([1, 2, 3]),
            buckets=often(0.35),
            chunks=chunks,
            sets=often(0.2),
            val_samples=val_samples,
            val_every=r.choice([None, 1, 2, 3]) if val_samples else None,
            decoder={"random_flip": often(0.5), "center_crop": often(0.5)},
            steps=r.randint(4, 10),
            epochs=r.choice([-1, -1, 2, 3]),
            save_every=r.choice([1, 2, 3, None]),
            save_top_k=r.choice([0, 1, -1]),
            save_last=r.choice([True, "link"]),
            on_chunk_end=chunks > 1 and often(0.3),
            monitored=bool(val_samples) and often(0.4),
            stops=r.choice([1, 1, 2, 3]),
        )

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))


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


class Record(Callback):
    """Keeps what each batch of a run gave, and each validation; what is done again replaces what was lost."""

    def __init__(self, seen: dict[str, Any]) -> None:
        self.seen = seen

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        shown = {name: batch[name] for name in ("key", "slot", "caption", "pixel_values")}
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        self.seen[f"batch {number}"] = {"loss": float(outputs["loss"]), "rates": rates, **shown}

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen[f"validation {trainer.global_step}"] = float(trainer.callback_metrics["val/loss"])


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
    options: dict[str, Any] = {"text_adapter": peft.LoraConfig(r=2)} if drawn.text else {}
    if drawn.tokens:
        options["new_tokens"] = {"<cat>": 2, "<dog>": "red"}
    module = LoraDiffusion(
        StableDiffusion(str(base)),
        ADAPTERS[drawn.adapter](),
        OBJECTIVES[drawn.objective]() if drawn.objective else None,
        OPTIMIZERS[drawn.optimizer],
        lr_scheduler=SCHEDULES[drawn.schedule] if drawn.schedule else None,
        quantization=drawn.quantization and drawn.quantization(),
        base_dtype=drawn.base_dtype,  # type: ignore[arg-type]
        caption_dropout=drawn.caption_dropout,
        memory=MemoryOptions(**drawn.memory),  # type: ignore[arg-type]
        **options,
    )
    data = WebDatasetDataModule(
        train_shards=None if drawn.sets else str(shards / "a"),
        train_sets=[ShardSet(str(shards / "a")), ShardSet(str(shards / "b"), repeats=2)] if drawn.sets else None,
        val_shards=str(shards / "b") if drawn.sets and drawn.val_samples else None,
        val_samples=0 if drawn.sets else drawn.val_samples,
        batch_size=drawn.batch_size,
        resolution=16,
        buckets=AspectRatioBuckets(divisor=8) if drawn.buckets else None,
        decoder=ImageDecoder(**drawn.decoder, captions=Captions(shuffle_tags=True)),  # type: ignore[arg-type]
        chunks=Chunks(drawn.chunks),
        num_workers=num_workers,
    )
    moments = {"every_n_train_steps": drawn.save_every} if drawn.save_every else {"every_n_epochs": 1}
    chosen: dict[str, Any] = {"monitor": "val/loss", "save_top_k": 1} if drawn.monitored else {}
    kept = {"save_top_k": drawn.save_top_k, "save_last": drawn.save_last, "save_on_chunk_end": drawn.on_chunk_end}
    saving = AdapterCheckpoint(folder / "saved", enable_version_counter=False, **moments | kept | chosen)
    own: list[Callback] = [FiniteGradients(), StepMetrics(), Record(seen), saving, *callbacks]
    own += [AdapterEMA(drawn.ema)] if drawn.ema else []
    own += [ScheduleFree()] if drawn.optimizer == "schedule-free" else []
    own += [RankBudget(mean_rank=1.5, stop=0.7, prunings=3)] if drawn.budget else []
    value, algorithm = drawn.clip
    of_run: dict[str, Any] = {
        "default_root_dir": folder,
        "enable_checkpointing": True,
        "callbacks": own,
        "max_steps": drawn.steps,
        "max_epochs": drawn.epochs,
        "accumulate_grad_batches": drawn.accumulate,
        "gradient_clip_val": value,
        "gradient_clip_algorithm": algorithm if value else None,
        "val_check_interval": drawn.val_every and drawn.val_every * drawn.accumulate,
        "check_val_every_n_epoch": None if drawn.val_every else 1,
        "num_sanity_val_steps": 0,
    }
    trainer = Trainer(**trainer_options | of_run)
    resumes = (folder / "saved" / "last.ckpt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path="last" if resumes else None)


def saved(folder: Path) -> dict[str, Any]:
    """All adapters of a run, and its last checkpoint but for paths and times."""
    files = {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    checkpoints = sorted(path.name for path in (folder / "saved").glob("*.ckpt"))
    checkpoint = torch.load(folder / "saved" / "last.ckpt", weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "WebDatasetDataModule")
    states = {name: checkpoint[name] for name in names} | {"rng": checkpoint["lit_lora"]["rng"]}
    callbacks = {name: state for name, state in checkpoint["callbacks"].items() if "AdapterCheckpoint" not in name}
    return {"files": files, "checkpoints": checkpoints, "states": states, "callbacks": callbacks}


@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_that_is_resumed_equals_one_that_was_never_stopped(
    number: int,
    sd_folder: Path,
    encode_image: Callable[..., bytes],
    trainer_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    r = random.Random(f"{SEED} {number}")
    for trial in range(20):
        drawn, shards = Options.draw(r), tmp_path / f"shards-{trial}"
        print(f"\nLIT_LORA_RESUME_SEED={SEED}, {number}: {drawn}")
        for name, count, per_shard in (("a", drawn.images, r.choice([2, 3, 5])), ("b", 5, 3)):
            images = tmp_path / f"images-{name}-{trial}"
            images.mkdir()
            for i in range(count):
                width, height = r.choice([(24, 16), (16, 24), (20, 20), (32, 16)])
                (images / f"{i:02}.png").write_bytes(encode_image(width, height, "PNG", seed=i))
                (images / f"{i:02}.txt").write_text(f"a red {r.choice(['seven', 'star'])}, tag{i % 3}, tag{i % 5}")
            pack_folder(images, shards / name, samples_per_shard=per_shard)
        expected: dict[str, Any] = {}
        try:
            fit(drawn, sd_folder, shards, tmp_path / f"whole-{trial}", expected, trainer_options, 0)
        except (UserError, MisconfigurationException) as error:  # options that do not go together
            if expected:  # these are refused before the first step
                raise
            print(f"  refused: {error}")
            continue
        break
    else:
        pytest.fail("nothing but options that are refused")
    found: dict[str, Any] = {}
    batches = sum(name.startswith("batch") for name in expected)
    parts = tmp_path / "parts"
    for _ in range(drawn.stops):
        hook, calls = r.choice(HOOKS), r.randint(1, batches)
        print(f"  stopped at call {calls} of {hook}")
        try:
            fit(drawn, sd_folder, shards, parts, found, trainer_options, r.choice([0, 1, 2]), Stop(hook, calls))
        except StopError:
            continue
        break  # it has ended before
    fit(drawn, sd_folder, shards, parts, found, trainer_options, r.choice([0, 1, 2]))
    assert not list(differences(found, expected))[:20]
    assert not list(differences(saved(parts), saved(tmp_path / f"whole-{trial}")))[:20]
