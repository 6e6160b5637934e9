"""Options of a training run that are drawn by chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import peft
from prodigyopt import Prodigy
from torch import optim
from torch.optim import lr_scheduler as schedules

from lit_lora import (
    DDPM,
    FP8,
    NF4,
    W8A8,
    EvaInitialization,
    FlowMatching,
    Int8,
    LoftqInitialization,
    LogitNormal,
    LoraGaInitialization,
    MinSNR,
    Mode,
    Objective,
    OffsetNoise,
    PseudoHuber,
)
from tests.families.folders import FLOW_FOLDERS, FOLDERS

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

SHARED = ("adafactor", "prodigy")
"""Those of :data:`OPTIMIZERS` that do not keep one value for each weight, so that ranks cannot be pruned."""

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

STARTS: dict[str, Callable[[], Any]] = {
    "eva": lambda: EvaInitialization(steps=2),
    "lora-ga": lambda: LoraGaInitialization(steps=2),
    "loftq": LoftqInitialization,
}

LINEAR = ["lora", "rank-stabilized", "adalora", "oft", "vera", "fourier", "miss"]
"""Those of :data:`ADAPTERS` that adapt layers which transformers have too."""

UNETS = ["StableDiffusion", "StableDiffusionXL"]

FAMILIES = {kind.__name__: (kind, fixture) for kind, fixture in FOLDERS.items()}

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "min-snr": lambda **prior: DDPM(weighting=MinSNR(5.0), **prior),
    "offset noise": lambda **prior: DDPM(noise=[OffsetNoise(0.1)], **prior),
    "v": lambda **prior: DDPM(prediction_type="v_prediction", **prior),
    "huber": lambda **prior: DDPM(criterion=PseudoHuber(), input_perturbation=0.1, timestep_range=(0.1, 0.9), **prior),
}

FLOW_OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "flow": FlowMatching,
    "mode": lambda **prior: FlowMatching(Mode(), **prior),
    "flow huber": lambda **prior: FlowMatching(LogitNormal(), criterion=PseudoHuber(), **prior),
}


def _schedule_free(parameters: Any) -> optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(parameters, lr=1e-2, warmup_steps=3)


@dataclass
class Options:
    """What is drawn for one run."""

    family: str
    adapter: str
    start: str | None
    base_adapter: bool
    groups: bool
    optimizer: str
    schedule: str | None
    objective: str | None
    quantization: Any
    base_dtype: str
    caption_dropout: float
    memory: dict[str, bool]
    convolutions: str
    fused_lora: bool
    cached: str | None
    prior: bool
    text: bool
    tokens: bool
    accumulate: dict[int, int]
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

        family = r.choice(["StableDiffusion"] * len(FAMILIES) + [*FAMILIES])
        unet = family in UNETS
        objectives = FLOW_OBJECTIVES if FAMILIES[family][0] in FLOW_FOLDERS else OBJECTIVES
        in_backward = often(0.15)
        optimizer = r.choice(["adamw", "adamw", *OPTIMIZERS])
        adapter = r.choice(["lora", "lora", *(ADAPTERS if unet else LINEAR)])
        cached = r.choice([None, None, "latents", "latents and text"])
        is_lora = adapter in ("lora", "rank-stabilized")
        averaged = optimizer == "schedule-free"  # by the optimizer itself
        val_samples, chunks = r.choice([0, 2, 3]), r.choice([1, 1, 2, 3])
        sets, prior = often(0.2), often(0.4)
        start = r.choice([None, None, None, *STARTS]) if is_lora else None
        quantization = r.choice([None, None, Int8, NF4, FP8, W8A8])
        return cls(
            family=family,
            adapter=adapter,
            start=start if quantization or start != "loftq" else None,
            base_adapter=often(0.15),
            groups=is_lora and optimizer != "prodigy" and often(0.2),
            optimizer=optimizer,
            schedule=None if averaged or often(0.3) else r.choice(list(SCHEDULES)),
            objective=r.choice([*objectives] if sets and prior else [None, *objectives]),
            quantization=quantization,
            base_dtype=r.choice(["float32", "bfloat16"]),
            caption_dropout=r.choice([0, 0.5]),
            memory={
                "gradient_checkpointing": often(0.3),
                "optimizer_in_backward": in_backward,
                "offload_blocks": often(0.1),
            },
            convolutions=r.choice(["plain", "plain", "channels_last", "packed"]) if unet else "plain",
            fused_lora=is_lora and often(0.2),
            cached=cached,
            prior=sets and prior,
            text=unet and cached != "latents and text" and often(0.2),
            tokens=unet and cached != "latents and text" and often(0.2),
            accumulate={0: 1} if in_backward else r.choice([{0: 1}, {0: 2}, {0: 3}, {0: 1, 1: 3}]),  # by epochs
            clip=(None if in_backward else r.choice([None, 1.0]), r.choice(["norm", "value"])),
            ema=None if averaged else r.choice([None, 0.9]),
            budget=is_lora and not in_backward and optimizer not in SHARED and often(0.4),
            images=r.randint(6, 20),
            batch_size=r.choice([1, 2, 3]),
            buckets=often(0.35),
            chunks=chunks,
            sets=sets,
            val_samples=val_samples,
            val_every=r.choice([None, 1, 2, 3]) if val_samples else None,
            decoder={"random_flip": often(0.5), "center_crop": bool(cached) or often(0.5)},
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
