"""Runs of a tiny model that every strategy has to be able to do; all processes call the same ones in the same order."""

from __future__ import annotations

import copy
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig, PeftConfig
from torch import Tensor, distributed, nn
from torch.distributed import distributed_c10d

from lit_lora.adapters.parameter_groups import ParameterGroup
from lit_lora.adapters.ranked_layer import layer_ranks
from lit_lora.callbacks import (
    AdapterCheckpoint,
    AdapterEMA,
    FiniteGradients,
    MemoryProfiler,
    Preemption,
    RankBudget,
    RunReport,
    SampleImages,
    StepMetrics,
)
from lit_lora.datamodules import WebDatasetDataModule
from lit_lora.distributed import LitLoraFSDP
from lit_lora.distributed.collectives import full_tensor
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.profiling.kinds import MemoryKinds
from lit_lora.quantization import Quantization
from lit_lora.sampling import SamplingOptions

WORLD = int(os.environ.get("WORLD_SIZE", 1))
GLOBAL_BATCH = 4
STEPS = 12
SAVED_AT = 2
RESUMED_TO = 4

STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": "lit_lora_fsdp",
    "ZeRO-1": "lit_lora_deepspeed_stage_1",
    "ZeRO-2": "lit_lora_deepspeed_stage_2",
    "ZeRO-3": "lit_lora_deepspeed_stage_3",
}
"""By short names, what the trainer is given."""


def sources(strategy: str) -> list[str]:
    """Whose checkpoints a strategy goes on from: those of a single process, its own, and those of the next in the list.

    A checkpoint is the same whoever wrote it, which a test of its own compares, so that a ring stands for all pairs.
    """
    names = list(STRATEGIES)
    return ["single", strategy, names[(names.index(strategy) + 1) % len(names)]]


TIMEOUT = timedelta(minutes=20)

OF_FOUR: dict[str, Any] = {
    "ddp": DDPStrategy(timeout=TIMEOUT),
    "hybrid": LitLoraFSDP(shard_size=2, timeout=TIMEOUT),
}
"""What four processes do: the second shares one copy of the weights out over two, so there are two copies."""

FEATURES = (
    "accumulation",
    "clipping by value",
    "checkpointing",
    "compile",
    "fused LoRA",
    "EMA",
    "validation",
    "sampling",
    "profiling",
    "Int8",
    "NF4",
    "DoRA",
    "modules_to_save",
    "pruned ranks",
    "parameter groups",
    "skipped steps",
    "text encoders",
)
"""Features of the table in docs/cluster.md; clipping by norm is in every run."""

REFUSED: dict[tuple[str, str], str] = {
    ("ZeRO-1", "clipping by value"): "DeepSpeed does not support clipping by value",
    ("ZeRO-2", "clipping by value"): "DeepSpeed does not support clipping by value",
    ("ZeRO-3", "clipping by value"): "DeepSpeed does not support clipping by value",
    ("ZeRO-3", "compile"): "compile_blocks gains nothing under ZeRO-3",
    ("ZeRO-3", "EMA"): "AdapterEMA needs full parameters",
}
"""Which strategy refuses which feature, and what its error says."""


def feature_table() -> str:
    """The table in docs/cluster.md of what works under which strategy."""
    columns = list(STRATEGIES.values())
    lines = ["| | " + " | ".join(f"`{name}`" for name in columns) + " |", "|---|" + "---|" * len(columns)]
    for feature in ("training, resuming, clipping by norm", *FEATURES):
        cells = ["no" if (short, feature) in REFUSED else "yes" for short in STRATEGIES]
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Spoils(Callback):
    """Puts NaN into the last sample of the last process's batch, from one batch to before another."""

    def __init__(self, first: int, end: int) -> None:
        self.batches = range(first, end)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.batches and trainer.global_rank == trainer.world_size - 1:
            batch["pixel_values"] = batch["pixel_values"].float()
            batch["pixel_values"][-1] = torch.nan


class Unchanged(Callback):
    """Whether one batch changes neither the adapter nor the optimizer's state."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.before: Any = None
        self.same = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.before = _everything(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            self.same = same(self.before, _everything(trainer))


def _everything(trainer: Trainer) -> Any:
    state = trainer.strategy.optimizer_state(trainer.optimizers[0])
    return copy.deepcopy((adapter(trainer.lightning_module), state))


class Seen(Callback):
    """What a run has seen: losses over all processes, keys of the samples, and how it was when it began."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.keys: list[list[str]] = []
        self.start: dict[str, Tensor] = {}
        self.held: dict[str, int] = {}
        self.optimizer: dict[str, Any] = {}
        self.first_optimizer: Callable[[], Any] = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first_optimizer = weakref.ref(trainer.optimizers[0])
        self.start = adapter(pl_module)
        # Not the tensors that training goes on with.
        self.optimizer = copy.deepcopy(trainer.strategy.optimizer_state(trainer.optimizers[0]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self.losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
        self.keys.append(batch["key"])
        self.held = MemoryKinds(pl_module, trainer.optimizers, pl_module.device).count()


def adapter(module: LightningModule) -> dict[str, Tensor]:
    """The trained tensors, whole, by name."""
    return {
        name: full_tensor(parameter).detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def module_of(model: Path, adapter_config: PeftConfig | None = None, **options: Any) -> LoraDiffusion:
    """The tiny model, in float32 unless something else is asked for."""
    torch.manual_seed(0)
    config = adapter_config or LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"])
    options.setdefault("base_dtype", "float32")
    options.setdefault("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    return LoraDiffusion(StableDiffusion(str(model)), config, **options)


def data_of(shards: Path, **options: Any) -> WebDatasetDataModule:
    """Batches of the same samples whatever the number of processes."""
    options.setdefault("batch_size", GLOBAL_BATCH // WORLD)
    return WebDatasetDataModule(str(shards), resolution=16, num_workers=0, **options)


def trainer_of(strategy: Any, folder: Path, callbacks: list[Callback] | None = None, **options: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    options.setdefault("max_steps", STEPS)
    options.setdefault("logger", False)
    return Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy,
        max_epochs=-1,
        default_root_dir=folder,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, AdapterCheckpoint) for c in callbacks or ()),
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        **options,
    )


def train(
    strategy: Any,
    model: Path,
    shards: Path,
    folder: Path,
    *,
    resume: Path | None = None,
    module: LoraDiffusion | None = None,
    callbacks: list[Callback] | None = None,
    data: WebDatasetDataModule | None = None,
    **options: Any,
) -> tuple[Seen, LoraDiffusion, Trainer]:
    """Train; with norm clipping, which is everywhere."""
    seen = Seen()
    module = module or module_of(model)
    options.setdefault("gradient_clip_val", 0.5)
    trainer = trainer_of(strategy, folder, [seen, *(callbacks or [])], **options)
    trainer.fit(module, data or data_of(shards), ckpt_path=None if resume is None else str(resume))
    return seen, module, trainer


def saving(folder: Path, every: int) -> AdapterCheckpoint:
    """Checkpoints named by their step."""
    return AdapterCheckpoint(
        folder,
        filename="{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=every,
        save_top_k=-1,
        enable_version_counter=False,
    )


def losses_and_checkpoint(strategy: Any, model: Path, shards: Path, folder: Path) -> dict[str, Any]:
    """Some steps, with a checkpoint after every second."""
    callbacks = [saving(folder, SAVED_AT), Preemption(), StepMetrics()]
    seen, _, trainer = train(strategy, model, shards, folder, callbacks=callbacks, log_every_n_steps=STEPS)
    logged = {
        name: float(value) for name, value in trainer.callback_metrics.items() if name != "train/images_per_second"
    }
    groups: Any = distributed_c10d._world.pg_map if distributed.is_initialized() else []
    backends = [group._get_backend(device) for group in groups for device in group._device_types]
    limits = sorted({backend.options._timeout.total_seconds() for backend in backends})
    seen_by_all = {"losses": seen.losses, "keys": seen.keys, "logged": logged, "limits": limits}
    return {**seen_by_all, "groups": len(groups), "held": seen.held}


def resumed(strategy: Any, model: Path, shards: Path, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Go on from a checkpoint of any strategy: what was there at the start, and the losses from there on."""
    seen, *_ = train(
        strategy, model, shards, folder, resume=checkpoint, max_steps=RESUMED_TO, callbacks=[saving(folder, RESUMED_TO)]
    )
    saved = torch.load(checkpoint, weights_only=True)
    result: dict[str, Any] = {
        "losses": seen.losses,
        "keys": seen.keys,
        "same adapter": seen.start.keys() == saved["state_dict"].keys()
        and all(torch.equal(value.cpu(), saved["state_dict"][name]) for name, value in seen.start.items()),
    }
    if seen.optimizer:  # whole in the first process, at least
        result["same optimizer"] = same(seen.optimizer, saved["optimizer_states"][0])
    return result


def rewritten(strategy: Any, model: Path, shards: Path, folder: Path, checkpoint: Path) -> None:
    """Load a checkpoint and write the adapter's files, without training in between."""
    module = module_of(model)
    trainer = trainer_of(strategy, folder, [saving(folder, 1)])
    trainer.validate(module, data_of(shards, val_samples=4), ckpt_path=str(checkpoint), verbose=False)
    module.save_adapter(folder / "adapter")


def same(one: Any, other: Any) -> bool:
    """Whether two states have the same values."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def with_feature(name: str, strategy: Any, model: Path, shards: Path, folder: Path) -> dict[str, Any]:
    """A few steps with one feature of the table in docs/cluster.md: the losses and what the feature leaves behind."""
    fresh = copy.deepcopy(strategy)  # a strategy is of one run, and some features need two
    options: dict[str, Any] = {"max_steps": RESUMED_TO}
    module, callbacks, data = module_of(model), [], None
    if name == "accumulation":
        options["accumulate_grad_batches"] = 2
    elif name == "clipping by value":
        options |= {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    elif name == "checkpointing":
        module = module_of(model, memory=MemoryOptions(gradient_checkpointing=True))
    elif name == "compile":
        torch._dynamo.reset()
        module = module_of(model, compile_blocks=True)
    elif name == "fused LoRA":
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_out.0"])
        module = module_of(model, config, fused_lora=True, memory=MemoryOptions(gradient_checkpointing=True))
    elif name == "EMA":
        callbacks = [AdapterEMA(decay=0.9), saving(folder, SAVED_AT)]
    elif name == "validation":
        module = module_of(model, sampling=SamplingOptions(num_inference_steps=2))
        data = data_of(shards, val_samples=5)
        options |= {"val_check_interval": 2}
    elif name == "sampling":
        callbacks = [SampleImages(["a", "b", "c"], every_n_steps=2, num_inference_steps=2)]
        options["logger"] = None
    elif name == "profiling":
        callbacks = [MemoryProfiler(every_n_steps=1), RunReport()]
    elif name in ("Int8", "NF4"):
        module = module_of(model, quantization=quantization(name), base_dtype="bfloat16")
    elif name == "DoRA":
        config = LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["to_q", "conv1"])
        module = module_of(model, config)
    elif name == "modules_to_save":
        module = module_of(model, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], modules_to_save=["conv_out"]))
    elif name == "pruned ranks":
        module, callbacks = pruned(strategy, model, folder)
    elif name == "parameter groups":
        groups = [ParameterGroup("*.lora_B.*", lr_ratio=4), ParameterGroup("*.mid_block.*", lr=1e-3, weight_decay=0.5)]
        module, callbacks = module_of(model, parameter_groups=groups), [saving(folder, SAVED_AT)]
    elif name == "text encoders":
        groups = [ParameterGroup("text_encoder.*", lr_ratio=0.5)]
        trained = {"text_adapter": LoraConfig(r=2, lora_alpha=2), "new_tokens": {"caption": "a red seven"}}
        module = module_of(model, **trained, parameter_groups=groups)
        callbacks = [saving(folder, SAVED_AT)]
    elif name == "skipped steps":
        guard, unchanged = FiniteGradients(patience=2), Unchanged(1)
        callbacks = [Spoils(1, 2), guard, unchanged]
    with captured_alone() if name == "compile" else nullcontext():
        seen, module, trainer = train(
            strategy, model, shards, folder, module=module, callbacks=callbacks, data=data, **options
        )
    result: dict[str, Any] = {"losses": seen.losses}
    if name == "pruned ranks":
        result["ranks"] = layer_ranks(module)
        result |= {"trained": sum(map(Tensor.numel, adapter(module).values())), "held": held(trainer)}
        result["first optimizer is gone"] = seen.first_optimizer() is None
        again, callbacks = pruned(strategy, model, folder / "again")
        options["resume"] = folder / f"{SAVED_AT}.ckpt"
        resumed_run, *_ = train(fresh, model, shards, folder, module=again, callbacks=callbacks, **options)
        result["resumed"] = resumed_run.losses
        result["same adapter"] = same(adapter(module), adapter(again))
    if name == "validation":
        result["val/loss"] = float(trainer.callback_metrics["val/loss"])
        images = trainer.predict(module, data)
        result["images"] = sum(len(batch) for batch in images or [])
    if name == "text encoders":
        again, *_ = train(
            fresh,
            model,
            shards,
            folder / "resumed",
            resume=folder / f"{SAVED_AT}.ckpt",
            module=module_of(model, **trained, parameter_groups=groups),
            **options,
        )
        result["resumed"] = again.losses
    if name == "parameter groups":
        module, name_of_first = module_of(model, parameter_groups=groups), folder / f"{SAVED_AT}.ckpt"
        again, *_ = train(fresh, model, shards, folder / "resumed", resume=name_of_first, module=module, **options)
        result["resumed"] = again.losses
    if name == "skipped steps":
        result["losses"] = [loss for loss in seen.losses if math.isfinite(loss)]
        result["skipped"] = guard.skipped
        result["unchanged"] = unchanged.same
        try:
            ending = [Spoils(1, 9), FiniteGradients(patience=2)]
            train(fresh, model, shards, folder, callbacks=ending, **options)
        except UserError as error:
            result["end"] = str(error)
    return result


def held(trainer: Trainer) -> int:
    """Number of elements that the optimizer steps in this process, and of its states of them."""
    state = trainer.optimizers[0].state
    values = [value for one in state.values() for value in one.values() if value.numel() > 1]
    return sum(value.untyped_storage().nbytes() // value.itemsize for value in [*state, *values])


def pruned(strategy: Any, model: Path, folder: Path) -> tuple[LoraDiffusion, list[Callback]]:
    """A module and callbacks for a run that prunes the ranks twice, before and after a checkpoint."""
    module = module_of(model, LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_v", "conv1", "conv_in"]))
    budget = RankBudget(mean_rank=1.5, start=0.5, stop=0.75, prunings=2)
    average = [] if strategy == STRATEGIES["ZeRO-3"] else [AdapterEMA(decay=0.9)]
    return module, [budget, *average, saving(folder, SAVED_AT)]


@contextmanager
def captured_alone() -> Iterator[None]:
    """Compiling captures and differentiates graphs of the first block of each kind, and makes no machine code of them."""
    compile_module = nn.Module.compile
    compiled: set[type[nn.Module]] = set()

    def capture(block: nn.Module, **options: Any) -> None:
        if type(block) not in compiled:
            compiled.add(type(block))
            compile_module(block, backend="aot_eager", **options)

    nn.Module.compile = capture  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.compile = compile_module  # type: ignore[method-assign]


def quantization(name: str) -> Quantization:
    """A quantization by its name."""
    import lit_lora.quantization

    made: Quantization = getattr(lit_lora.quantization, name)()
    return made
