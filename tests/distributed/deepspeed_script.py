"""Two gloo processes train under DeepSpeed in all ways: ``python -m tests.distributed.deepspeed_script FOLDER MODEL``.

What each process has seen goes to ``FOLDER/rank-N.json``; checkpoints are in ``FOLDER``, those of a single process already.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Adafactor

from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA, SampleImages
from lit_lora.distributed import shards_weights
from lit_lora.distributed.deepspeed import LitLoraDeepSpeed
from lit_lora.errors import UserError
from lit_lora.families import Batch, StableDiffusion
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.quantization import NF4, Int8
from lit_lora.sampling import SamplingOptions
from tests.helpers import make_batches

STEPS, RESUMED_FROM, SHORT = 9, 7, 4
SOURCES = {1: ("single", "stage-3"), 2: ("stage-2", "stage-1"), 3: ("stage-3", "single")}
"""Whose checkpoints each stage goes on from."""
WITHIN = f"epoch=0-step={RESUMED_FROM}.ckpt"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
NOTHING_STAYS = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
CONFIG = {"zero_optimization": NOTHING_STAYS}
"""With stage 3 small weights would stay whole, and here all are small."""


class Resumable:
    """A loader of ready-made batches that goes on where it was."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class WithOddParameter(LoraDiffusion):
    """Trains five numbers more, which two processes cannot shard evenly; notes the frozen bytes that it has after a pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.odd = nn.Parameter(torch.linspace(1, 2, 5))
        self.held: dict[str, int] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.held = {"here": 0, "in all": 0}
        frozen: list[Any] = [parameter for parameter in self.parameters() if not parameter.requires_grad]
        for parameter in frozen:
            self.held["here"] += parameter.nbytes + (parameter.ds_tensor.nbytes if hasattr(parameter, "ds_id") else 0)
            self.held["in all"] += getattr(parameter, "ds_shape", parameter.shape).numel() * parameter.itemsize
        return loss + (self.odd - batch_idx).square().mean()


class Observer(Callback):
    """Keeps the loss of each batch, and in the end the dtypes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.dtypes: set[str] = set()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.dtypes = {
            f"{'trained' if parameter.requires_grad else 'frozen'} {str(parameter.dtype).removeprefix('torch.')}"
            for parameter in pl_module.parameters()
        }


def in_two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": parameters[1:]}, {"params": parameters[:1], "lr": 1e-2}], lr=1e-3)


def make_module(model: str, **options: Any) -> WithOddParameter:
    torch.manual_seed(0)
    return WithOddParameter(
        StableDiffusion(model),
        options.pop("adapter", LoraConfig(r=2, lora_alpha=2)),
        optimizer=options.pop("optimizer", in_two_groups),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=3),
        base_dtype=options.pop("base_dtype", "float32"),
        **options,
    )


def batches(count: int, seed: int = 3) -> Resumable:
    """Batches of four, of which this process has its part."""
    mine = slice(RANK * 4 // WORLD, (RANK + 1) * 4 // WORLD)
    return Resumable(
        [{key: value[mine] for key, value in batch.items()} for batch in make_batches(count, 4, seed=seed)]
    )


def make_trainer(strategy: Strategy | str, **options: Any) -> Trainer:
    options = {"max_epochs": -1, "enable_checkpointing": False, "logger": False, **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    # Each process has its part of the data already.
    return Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, use_distributed_sampler=False, **quiet, **options
    )


def train(
    model: str,
    strategy: Strategy | str,
    folder: Path,
    *,
    max_steps: int = STEPS,
    count: int = STEPS,
    resume: Path | None = None,
    options: dict[str, Any] | None = None,
    more_callbacks: Sequence[Callback] = (),
    **module_options: Any,
) -> dict[str, Any]:
    """Train on so many batches, keep a checkpoint from within and one from after, and note what there was to see."""
    observer = Observer()
    checkpoints = AdapterCheckpoint(
        folder, every_n_train_steps=RESUMED_FROM, save_top_k=-1, enable_version_counter=False
    )
    callbacks = [observer, checkpoints, *more_callbacks, *([] if shards_weights(strategy) else [AdapterEMA()])]
    trainer = make_trainer(
        strategy, max_steps=max_steps, enable_checkpointing=True, callbacks=callbacks, **(options or {})
    )
    module = make_module(model, **module_options)
    trainer.fit(module, batches(count), ckpt_path=resume and str(resume), weights_only=True)
    trainer.save_checkpoint(folder / "after.ckpt")
    return {"losses": observer.losses, "held": module.held, "dtypes": sorted(observer.dtypes)}


def train_unevenly(model: str, strategy: Strategy | str, folder: Path) -> dict[str, Any]:
    """Accumulates over two batches, the last one of a pass alone; clips; computes activations again."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01, "max_epochs": 2}
    return train(
        model,
        strategy,
        folder,
        max_steps=-1,
        count=3,
        options=options,
        memory=MemoryOptions(gradient_checkpointing=True),
    )


def train_stored(model: str, strategy: Callable[[], Strategy | str], folder: Path) -> dict[str, dict[str, Any]]:
    """Over bases in few bits."""
    kinds: dict[str, dict[str, Any]] = {"int8": {"quantization": Int8()}, "nf4": {"quantization": NF4()}}
    return {
        name: train(model, strategy(), folder / name, max_steps=SHORT, base_dtype="bfloat16", **kind)
        for name, kind in kinds.items()
    }


def train_reading_weights(model: str, strategy: Strategy | str, folder: Path) -> dict[str, Any]:
    """With an adapter that reads the base's weights, which draws before it has trained."""
    samples = SampleImages(["a", "b", "c"], num_inference_steps=1)
    adapter = LoraConfig(r=2, lora_alpha=2, use_dora=True)
    options = {"max_steps": SHORT, "options": {"default_root_dir": folder}, "more_callbacks": [samples]}
    return train(model, strategy, folder, adapter=adapter, memory=MemoryOptions(gradient_checkpointing=True), **options)  # type: ignore[arg-type]


def evaluate(model: str, strategy: Strategy | str, new_strategy: Strategy | str, checkpoint: Path) -> dict[str, Any]:
    """Validate during training, after it, and from a checkpoint; generate images; continue training."""
    module = make_module(model, sampling=SamplingOptions(num_inference_steps=2))
    trainer = make_trainer(strategy, max_steps=SHORT, val_check_interval=2)
    trainer.fit(module, batches(SHORT), batches(2, seed=4))
    found = {"fit": float(trainer.callback_metrics["val/loss"])}
    [after] = trainer.validate(module, batches(2, seed=4), verbose=False)
    images = [torch.tensor(list(image.tobytes())) for batch in trainer.predict(module, batches(1)) for image in batch]
    trainer.fit_loop.epoch_loop.max_steps = SHORT + 1
    trainer.fit(module, batches(SHORT + 1), batches(2, seed=4))

    module = make_module(model)
    [from_file] = make_trainer(new_strategy).validate(
        module, batches(2, seed=4), ckpt_path=str(checkpoint), verbose=False, weights_only=True
    )
    return {
        **found,
        "after": after["val/loss"],
        "from file": from_file["val/loss"],
        "images": [[len(image), float(image.float().std())] for image in images],
        "steps": trainer.global_step,
    }


def refusals(model: str) -> dict[str, str]:
    """What is said to a run that cannot be."""
    runs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "clip": ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, {}),
        "optimizer": ({}, {"optimizer": partial(Adafactor, lr=1e-3, relative_step=False)}),
    }
    said = {}
    for name, (options, module_options) in runs.items():
        trainer = make_trainer(LitLoraDeepSpeed(), max_steps=1, **options)
        try:
            trainer.fit(make_module(model, **module_options), batches(1))
        except UserError as error:
            said[name] = str(error)
    return said


def main() -> None:
    out, model = Path(sys.argv[1]), sys.argv[2]
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        strategy = LitLoraDeepSpeed(stage, config=CONFIG if stage == 3 else None)
        found[f"stage-{stage}"] = train(model, strategy, out / f"stage-{stage}")
    for stage in (1, 2, 3):
        for source in SOURCES[stage]:
            resume = out / source / WITHIN
            name = f"stage-{stage}-from-{source}"
            found[name] = train(model, LitLoraDeepSpeed(stage), out / name, resume=resume)
        name = f"stage-{stage}-uneven"
        found[name] = train_unevenly(model, LitLoraDeepSpeed(stage), out / name)
    for stage, offload in ((2, {}), (3, {"offload_parameters": True})):
        strategy = LitLoraDeepSpeed(stage, offload_optimizer=True, config=CONFIG, **offload)
        found[f"stage-{stage}-offload"] = train(model, strategy, out / f"stage-{stage}-offload", max_steps=SHORT)
        nothing_stays = partial(LitLoraDeepSpeed, stage, config=CONFIG)
        found[f"stage-{stage}-stored"] = train_stored(model, nothing_stays, out / f"stage-{stage}-stored")
        name = f"stage-{stage}-reads"
        found[name] = train_reading_weights(model, nothing_stays(), out / name)
        checkpoint = out / "single" / "after.ckpt"
        found[f"stage-{stage}-evaluated"] = evaluate(
            model, LitLoraDeepSpeed(stage), nothing_stays(offload_optimizer=True), checkpoint
        )
    found["refusals"] = refusals(model)
    (out / f"rank-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
