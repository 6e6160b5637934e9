"""Counts the collective calls of one training step of the embedded base, as torch's dispatcher sees them."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch
from communication_model import Call
from lightning.pytorch import Callback
from peft import LoraConfig
from short_training import RepeatedBatch, cached_batch, plain_trainer
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lit_lora.quantization
from lit_lora import LoraDiffusion, StableDiffusion
from lit_lora.callbacks import Preemption
from lit_lora.distributed import LitLoraDeepSpeed, LitLoraFSDP

_COUNTED_STEP = (
    2  # In the first step DDP rebuilds its buckets, and ZeRO-3 records in which order to gather the weights.
)


def count_calls(strategy: str, quantization: str, processes: int, zero_3: dict[str, int]) -> list[Call]:
    """Train the embedded base in this process, one of several, and count the collective calls of the third step.

    The batches hold latents and text embeddings, as a cache provides them.

    Args:
        strategy: One of :data:`communication_model.STRATEGIES`.
        quantization: Name of the base's quantization.
        processes: Number of processes that train together.
        zero_3: Limits of ZeRO-3 in elements: ``persistent``, ``bucket`` and ``live``.

    Raises:
        SystemExit: If torch's profiler sees another number of calls.
    """
    counting = _CountStep()
    module = LoraDiffusion(
        StableDiffusion("embedded"),
        LoraConfig(r=8, lora_alpha=8),
        quantization=getattr(lit_lora.quantization, quantization)(),
    )
    plain_trainer(
        devices=processes,
        strategy=_strategy(strategy, processes, zero_3),
        gradient_clip_val=1.0,
        max_steps=_COUNTED_STEP + 2,
        callbacks=[counting, Preemption()],
    ).fit(module, RepeatedBatch(cached_batch(2, 32, text_width=64, downsampling=4), 4 * processes))
    return counting.counter.calls


class _Counter(TorchDispatchMode):
    """Records the collective calls inside the ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor dispatches the call again with the local shards
        if func.namespace in ("c10d", "_c10d_functional") and "_wrap_tensor" not in func.name():
            operation = _operation(func.name())
            payload = 0 if operation == "barrier" else max(_bytes(argument) for argument in args)
            self.calls.append(Call(operation, _purpose(operation), payload))
        return func(*args, **(kwargs or {}))


class _CountStep(Callback):
    """Counts the calls from the start of one step to the start of the next, so that those of other callbacks are included."""

    def __init__(self) -> None:
        self.counter = _Counter()
        self._profiler = torch.profiler.profile()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == _COUNTED_STEP:
            self._profiler.__enter__()
            self.counter.__enter__()
        if batch_idx == _COUNTED_STEP + 1:
            self.counter.__exit__(None, None, None)
            self._profiler.__exit__(None, None, None)
            profiled = [event for event in self._profiler.events() or () if event.name.startswith("gloo:")]
            if len(profiled) != len(self.counter.calls):
                sys.exit(f"the profiler saw {len(profiled)} collective calls, the counter {len(self.counter.calls)}")


def _strategy(name: str, processes: int, zero_3: dict[str, int]) -> Any:
    if name == "hsdp":
        return LitLoraFSDP(shard_size=processes // 2)
    if not name.startswith("zero"):
        return name
    limits = {
        "stage3_param_persistence_threshold": zero_3["persistent"],
        "stage3_prefetch_bucket_size": zero_3["bucket"],
        "stage3_max_live_parameters": zero_3["live"],
    }
    return LitLoraDeepSpeed(stage=int(name[-1]), config={"zero_optimization": limits if name == "zero-3" else {}})


def _operation(name: str) -> str:
    """The kind of collective call that an operator of torch makes."""
    name = name.rpartition("::")[2]
    kinds = {"allreduce": "all-reduce", "all_reduce": "all-reduce", "reduce_scatter": "reduce-scatter"}
    kinds |= {"allgather": "all-gather", "all_gather": "all-gather", "broadcast": "broadcast", "barrier": "barrier"}
    return next((kind for part, kind in kinds.items() if part in name), name)


def _purpose(operation: str) -> str:
    """What the present call sends, according to the functions on the stack."""
    stack = [f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()]
    sources = {
        "preemption.py": "stop signals",
        "_broadcast_sigterm_tensor": "Lightning's SIGTERM",
        "logger_connector/result.py": "logged loss",
        "grad_norm": "norm of the gradients",
        "has_overflow": "norm of the gradients",
        "clip_gradients": "norm of the gradients",
        "stage3.py:_post_step": "small weights",
        "persistent": "small weights",
    }
    for source, purpose in sources.items():
        if any(source in frame for frame in stack):
            return purpose
    return "weights" if operation == "all-gather" else "gradients"


def _bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
