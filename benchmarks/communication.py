"""What a training step sends under each strategy: ``python benchmarks/communication.py``.

First it counts. Several processes train the embedded base with LoRA over gloo on the CPU, from latents and text embeddings as
a cache gives them, and every collective call of one step is written down with its payload, as torch's dispatcher sees it; the
profiler has to see the same number of calls. Beside it stands what a model of the strategies says.

Then the model alone says it for large denoisers on many GPUs: how much each process sends in a step, inside its node and to
others, how long that takes if nothing overlaps with computation, and what of the weights each GPU keeps. Bandwidths and
latencies are options. Seconds of this table are predictions, nothing of it is measured.

The payload is the whole tensor that is reduced, or that all processes have after an all-gather. On a ring of n processes each
sends (n-1)/n of it in an all-gather, a reduce-scatter or a broadcast, and twice that in an all-reduce.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

STRATEGIES = ("ddp", "lit_lora_fsdp", "hsdp", "zero-1", "zero-2", "zero-3")
"""``hsdp`` is ``lit_lora_fsdp`` with a ``shard_size``, ``zero-1`` is ``lit_lora_deepspeed_stage_1`` and so on."""
RUNS = (
    ("ddp", "Dense"),
    ("lit_lora_fsdp", "Dense"),
    ("lit_lora_fsdp", "NF4"),
    ("hsdp", "Dense"),
    ("zero-1", "Dense"),
    ("zero-2", "Dense"),
    ("zero-3", "Dense"),
)
"""What is counted; more with ``--strategies`` and ``--bases``."""

BASES = ("Dense", "Int8", "NF4")
_ADAPTER_BYTES = 4
_ADAMW_BYTES = 8
_DDP_BUCKETS = (1 << 20, 25 << 20)
"""Bytes of the first and of all further buckets of gradients."""
_ZERO_BUCKET = 10_000_000
"""Elements of a bucket of our DeepSpeed strategy."""
_ZERO_PERSISTENT = 100_000
"""Up to so many elements ZeRO-3 leaves a parameter whole, and gathers it after each step."""
_ZERO_SMALL = {"persistent": 2_000, "bucket": 13_000, "live": 65_000}
"""The same limits for the embedded base, which is smaller than one bucket: 1 : 260 as for SDXL."""


class Weight(NamedTuple):
    """One parameter as it is stored."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def padded(self, n: int, rows: bool) -> int:
        """Bytes in n equal parts: of whole rows (FSDP2) or of single elements (ZeRO-3)."""
        if not rows:
            return math.ceil(self.count / n) * n * self.itemsize
        return math.ceil(self.shape[0] / n) * n * math.prod(self.shape[1:]) * self.itemsize


class Call(NamedTuple):
    """So many collective calls of one kind, with the bytes of their payloads together."""

    operation: str
    what: str
    payload: int
    calls: int = 1
    among: str = "all"
    """``all`` processes, those of one ``node``, or the ``replicas`` of a part, one in each node."""


class Counter(TorchDispatchMode):
    """Writes down the collective calls inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the parts of the processes
        if func.namespace in ("c10d", "_c10d_functional") and "_wrap_tensor" not in func.name():
            operation = _operation(func.name())
            payload = 0 if operation == "barrier" else max(_bytes(argument) for argument in args)
            self.calls.append(Call(operation, _purpose(operation), payload))
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="that the counted runs have")
    parser.add_argument("--strategies", nargs="*", choices=STRATEGIES, help="to count, with --bases")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=("Dense",))
    parser.add_argument("--gpus", nargs="*", type=int, default=(8, 64, 512))
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--inside", type=float, default=450, help="GB/s of a GPU to others of its node, one direction")
    parser.add_argument("--across", type=float, default=50, help="GB/s of a GPU's own network card, one direction")
    parser.add_argument("--call-latency", type=float, default=20, help="microseconds to start a collective call")
    parser.add_argument("--hop-inside", type=float, default=1, help="microseconds of a hop of the ring inside a node")
    parser.add_argument("--hop-across", type=float, default=5, help="microseconds of a hop between nodes")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one counted run")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.run:
        calls = _count(*options.run, options.processes)
        print(json.dumps(calls))
        return
    _print_versions()
    _print_counts(options)
    if not options.strategies:
        _print_predictions(options)


def predict(
    strategy: str, groups: Sequence[Sequence[Weight]], n: int, zero: dict[str, int] | None = None
) -> list[Call]:
    """What one step sends.

    Args:
        strategy: One of :data:`STRATEGIES`.
        groups: The weights, block by block, at last those outside the blocks.
        n: Processes that share the weights or the optimizer's state.
        zero: Limits of ZeRO-3.
    """
    trained = [weight for group in groups for weight in group if weight.trained]
    gradients = sum(weight.count for weight in trained) * _ADAPTER_BYTES
    if strategy == "ddp":
        first, other = _DDP_BUCKETS
        return [Call("all-reduce", "gradients", gradients, 1 + math.ceil(max(0, gradients - first) / other))]
    if strategy in ("zero-1", "zero-2"):
        buckets = math.ceil(gradients / _ADAPTER_BYTES / _ZERO_BUCKET)
        return [Call("all-reduce", "gradients", gradients, buckets), Call("all-gather", "weights", gradients, buckets)]
    if strategy == "zero-3":
        return list(_zero_3([weight for group in groups for weight in group], n, zero or {}))
    among = "node" if strategy == "hsdp" else "all"
    gathered = sum(weight.padded(n, rows=True) for group in groups for weight in group)
    learning = [[weight for weight in group if weight.trained] for group in groups]
    reduced = sum(weight.padded(n, rows=True) for group in learning for weight in group)
    with_trained = sum(bool(group) for group in learning)
    calls = [
        Call("all-gather", "weights", 2 * gathered, 2 * len(groups), among),
        Call("reduce-scatter", "gradients", reduced, with_trained, among),
    ]
    return (
        [*calls, Call("all-reduce", "gradients", reduced // n, with_trained, "replicas")] if among == "node" else calls
    )


def _zero_3(weights: Sequence[Weight], n: int, limits: dict[str, int]) -> Iterator[Call]:
    """Large weights are gathered for the forward and for the backward pass, in buckets; small ones one by one after the step."""
    small = [w for w in weights if w.count <= limits.get("persistent", _ZERO_PERSISTENT)]
    large = [w for w in weights if w.count > limits.get("persistent", _ZERO_PERSISTENT)]
    bucket = limits.get("bucket", _ZERO_BUCKET)
    # A weight that does not fit into a bucket comes by itself.
    calls = sum(min(1, w.count / bucket) for w in large)
    yield Call("all-gather", "weights", 2 * sum(w.padded(n, rows=False) for w in large), 2 * math.ceil(calls))
    yield Call("all-gather", "small weights", sum(w.padded(n, rows=False) for w in small), len(small))
    trained = [w for w in weights if w.trained]
    buckets = math.ceil(sum(w.count for w in trained) / _ZERO_BUCKET)
    yield Call("reduce-scatter", "gradients", sum(w.padded(n, rows=False) for w in trained), buckets)


def kept(strategy: str, groups: Sequence[Sequence[Weight]], n: int) -> int:
    """Bytes of base, adapter and AdamW's state that a process has between two steps."""
    weights = [weight for group in groups for weight in group]
    whole = sum(weight.count * weight.itemsize for weight in weights)
    state = sum(weight.count for weight in weights if weight.trained) * _ADAMW_BYTES
    if strategy == "ddp":
        return whole + state
    if strategy in ("zero-1", "zero-2"):
        return whole + state // n
    if strategy == "zero-3":
        small = sum(w.count * w.itemsize for w in weights if w.count <= _ZERO_PERSISTENT)
        return small + (whole - small + state) // n
    parts = sum(weight.padded(n, rows=True) for weight in weights) // n
    return parts + sum(w.padded(n, rows=True) for w in weights if w.trained) // n * _ADAMW_BYTES // _ADAPTER_BYTES


class Cost(NamedTuple):
    """Of a step, for each process: bytes that it sends inside its node and to others, and seconds one after the other."""

    inside: float
    across: float
    seconds: float


def cost(calls: Sequence[Call], gpus: int, options: argparse.Namespace) -> Cost:
    """What calls cost on rings, of which each node has as many as network cards, one for each GPU."""
    inside = across = seconds = 0.0
    for call in calls:
        nodes = math.ceil(gpus / options.gpus_per_node)
        size, hops_across = {
            "all": (gpus, nodes - 1),
            "node": (min(gpus, options.gpus_per_node), 0),
            "replicas": (nodes, nodes - 1),
        }[call.among]
        sent = call.payload * _on_the_wire(call.operation, size)
        # Of the rings through a node each leaves it at one GPU; the replicas of a part are one for each node.
        share = 0.0 if not hops_across else 1.0 if call.among == "replicas" else 1 / options.gpus_per_node
        inside, across = inside + sent * (1 - share), across + sent * share
        seconds += max(sent * (1 - share) / (options.inside * 1e9), sent * share / (options.across * 1e9))
        hops = hops_across * options.hop_across + (size - 1 - hops_across) * options.hop_inside
        rounds = 2 if call.operation == "all-reduce" else 1
        seconds += call.calls * (options.call_latency + rounds * hops) / 1e6
    return Cost(inside, across, seconds)


def _on_the_wire(operation: str, n: int) -> float:
    """Share of the payload that each of n processes sends on a ring."""
    return (2 if operation == "all-reduce" else 0 if operation == "barrier" else 1) * (n - 1) / n


def _print_versions() -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "deepspeed", "diffusers", "peft"))
    print(f"{packages}; {os.cpu_count()} CPU cores ({platform.machine()})\n")


def _print_counts(options: argparse.Namespace) -> None:
    from sharded_memory import in_fresh_processes

    n = options.processes
    print(
        f"Counted: one step of the embedded base, LoRA r=8, bfloat16, {n} processes (gloo), bytes of each process; hsdp: two"
        f" times {n} processes.\nzero-3 with limits that are as much smaller as the model, in elements: {_ZERO_SMALL}.\nWhat the"
        " model leaves out: FSDP2 does not gather a block before the first adapter again, zero-3 keeps weights near the turn from"
        "\nforward to backward."
    )
    print(
        f"{'':<60} {'counted':>30} {'predicted':>27}\n"
        f"{'strategy':<14} {'base':<6} {'operation':<15} {'what':<22} {'calls':>6} {'payload':>11} {'sent':>11} {'calls':>6}"
        f" {'payload':>11} {'differs':>8}"
    )
    runs = [(s, b) for s in options.strategies for b in options.bases] if options.strategies else RUNS
    for strategy, base in runs:
        count = 2 * n if strategy == "hsdp" else n
        arguments = [__file__, f"--processes={count}", "--run", strategy, base]
        environment = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
        found = [Call(*call) for call in in_fresh_processes(arguments, count, options.timeout, environment)[0]]
        groups = embedded(base)
        predicted = {(c.operation, c.what): c for c in predict(strategy, groups, n, _ZERO_SMALL)}
        keys = {(c.operation, c.what) for c in found} | predicted.keys()
        for key in sorted(keys, key=lambda key: (key not in predicted, key)):
            same = [call for call in found if (call.operation, call.what) == key]
            payload, expected = sum(call.payload for call in same), predicted.get(key)
            among = expected.among if expected else "all"
            sent = payload * _on_the_wire(key[0], {"node": n, "replicas": 2, "all": count}[among])
            line = f"{strategy:<14} {base:<6} {key[0]:<15} {key[1]:<22} {len(same):>6} {payload:>11,} {sent:>11,.0f}"
            if expected:
                differs = expected.payload / payload - 1 if payload else math.inf
                line += f" {expected.calls:>6} {expected.payload:>11,} {differs:>8.1%}"
            print(line, flush=True)
        if strategy == "ddp":
            adapter = sum(w.count for group in groups for w in group if w.trained) * _ADAPTER_BYTES
            reduced = sum(call.payload for call in found if call.what == "gradients")
            others = max(call.payload for call in found if call.what != "gradients")
            print(
                f"{'':<14} the adapter's gradients are {adapter:,} bytes, {reduced:,} are reduced; no other call sends more"
                f" than {others} bytes: the frozen base is not sent"
            )


def _print_predictions(options: argparse.Namespace) -> None:
    node = options.gpus_per_node
    print(
        f"\nPredicted, nothing of it measured: {node} GPUs in a node, for each GPU {options.inside:g} GB/s inside and"
        f" {options.across:g} GB/s across nodes;\n{options.call_latency:g} us for a call and {options.hop_inside:g} us inside,"
        f" {options.hop_across:g} us across nodes for a hop of its ring. LoRA r=16 in the attention's projections.\nhsdp is"
        f" lit_lora_fsdp with shard_size {node}. MB that each GPU sends in a step, seconds if nothing overlaps, GB of base,"
        " adapter and AdamW's\nstate on each GPU (without gradients, activations, and what is whole for the moment)."
        " The denoiser alone: latents and text embeddings\ncome from a cache."
    )
    found: dict[tuple[str, str, int, str], tuple[Cost, int]] = {}
    for name, build in (("SDXL", sdxl), ("FLUX.1-dev", flux)):
        for base in BASES:
            groups = build(base)
            weights = [weight for group in groups for weight in group]
            trained = sum(w.count for w in weights if w.trained)
            stored = sum(w.count * w.itemsize for w in weights if not w.trained)
            print(
                f"\n{name}, {'bfloat16' if base == 'Dense' else base} base: {stored / 1e9:.2f} GB in {len(groups)} groups,"
                f" {len(weights)} tensors; adapter {trained / 1e6:.1f} M parameters"
            )
            print(
                f"{'GPUs':>5} {'strategy':<14} {'calls':>6} {'MB inside':>10} {'MB across':>10} {'seconds':>8} {'GB kept':>8}"
            )
            for gpus in options.gpus:
                for strategy in ("ddp", "lit_lora_fsdp", "hsdp", "zero-2", "zero-3"):
                    if strategy == "hsdp" and gpus <= node:
                        continue
                    n = node if strategy == "hsdp" else gpus
                    calls = predict(strategy, groups, n)
                    one, bytes_kept = cost(calls, gpus, options), kept(strategy, groups, n)
                    found[name, base, gpus, strategy] = one, bytes_kept
                    print(
                        f"{gpus:>5} {strategy:<14} {sum(call.calls for call in calls):>6} {one.inside / 1e6:>10,.0f}"
                        f" {one.across / 1e6:>10,.0f} {one.seconds:>8.3f} {bytes_kept / 1e9:>8.2f}",
                        flush=True,
                    )
    _print_conclusions(found, max(options.gpus), node)


def _print_conclusions(found: dict[tuple[str, str, int, str], tuple[Cost, int]], gpus: int, node: int) -> None:
    def said(strategy: str, model: str = "FLUX.1-dev", base: str = "Dense") -> str:
        one, bytes_kept = found[model, base, gpus, strategy]
        return f"{(one.inside + one.across) / 1e9:.2f} GB sent, {one.seconds:.2f} s, {bytes_kept / 1e9:.1f} GB kept"

    print(
        f"\nWhere the base fits on a GPU beside the activations, ddp: it sends the adapter's gradients alone. On {gpus} GPUs:\n"
        f"  SDXL in bfloat16: {said('ddp', 'SDXL')}\n  FLUX.1-dev in NF4: {said('ddp', base='NF4')}\n"
        "zero-1 and zero-2 send half as much again and save AdamW's state, of which an adapter has little."
    )
    if gpus > node:
        print(
            "Where it does not fit, lit_lora_fsdp, on several nodes with shard_size: node, which sends no weights over the"
            " network."
            f"\n  FLUX.1-dev in bfloat16: {said('hsdp')}; with one copy on all GPUs: {said('lit_lora_fsdp')}\n"
            "One copy on hundreds of GPUs also fills the 16 rows of a LoRA matrix up to one for each GPU. zero-3 gathers its"
            f"\nsmall weights one by one after each step, so that calls take most of the time: {said('zero-3')}."
        )


def embedded(base: str) -> list[list[Weight]]:
    """The denoiser that is counted."""
    from lit_lora import StableDiffusion

    return _of_family(StableDiffusion("embedded"), base, 8)


def sdxl(base: str) -> list[list[Weight]]:
    """Stable Diffusion XL's denoiser."""
    from real_models import write_pipeline

    from lit_lora import StableDiffusionXL

    with tempfile.TemporaryDirectory() as folder:
        return _of_family(
            StableDiffusionXL(str(write_pipeline("sdxl", Path(folder) / "sdxl", weights=False))), base, 16
        )


def flux(base: str) -> list[list[Weight]]:
    """The transformer of FLUX.1-dev, no layer of which is left out of the quantization."""
    from diffusers import FluxTransformer2DModel

    import lit_lora.quantization
    from lit_lora.adapters import inject
    from lit_lora.planning.fake_module import fake_tensors
    from lit_lora.quantization.load import shape_model

    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            plain = FluxTransformer2DModel(guidance_embeds=True)
        plain.save_config(Path(folder) / "transformer")
        with fake_tensors():
            quantization = getattr(lit_lora.quantization, base)()
            model = shape_model(FluxTransformer2DModel, folder, "transformer", quantization, torch.bfloat16)
            adapted = inject(model, LoraConfig(r=16, lora_alpha=16), ("to_q", "to_k", "to_v", "to_out.0"))
            return _groups(adapted, plain, ("FluxTransformerBlock", "FluxSingleTransformerBlock"))


def _of_family(family: Any, base: str, rank: int) -> list[list[Weight]]:
    import lit_lora.quantization
    from lit_lora.embedded import resolve
    from lit_lora.planning.fake_module import fake_tensors

    folder = resolve(family.pretrained_model_name_or_path)
    with torch.device("meta"):
        kind = family.denoiser_class
        plain = kind.from_config(kind.load_config(folder, subfolder=family.denoiser_name))
    with fake_tensors():
        quantization = getattr(lit_lora.quantization, base)()
        family.load(torch.bfloat16, without=("vae", "text"), quantization=quantization, weights=False)
        family.add_adapter(LoraConfig(r=rank, lora_alpha=rank))
        return _groups(family.denoiser, plain, family.block_classes)


def _groups(denoiser: Any, plain: nn.Module, block_classes: Sequence[str]) -> list[list[Weight]]:
    """The weights in the groups in which ``load_adapted`` has them sharded.

    Args:
        denoiser: With the adapter.
        plain: The same model before anything was done to it.
        block_classes: Of its family.
    """
    from lit_lora.blocks import outermost_blocks
    from lit_lora.quantization.load import _parts

    names = {module: name for name, module in plain.named_modules()}
    model = denoiser.get_base_model()
    parts = [model.get_submodule(names[part]) for part in _parts(plain, set(outermost_blocks(plain, block_classes)))]
    seen: set[int] = set()
    groups = []
    for module in [*(part for part in parts[:-1] if not isinstance(part, BaseTunerLayer)), denoiser]:
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        if own:
            groups.append([Weight(tuple(p.shape), p.element_size(), p.requires_grad) for p in own])
    return groups


def _count(strategy: str, base: str, processes: int) -> list[Call]:
    """The calls of the third step, in this process."""
    from lightning.pytorch import Callback, LightningDataModule, Trainer

    import lit_lora.quantization
    from lit_lora import LoraDiffusion, StableDiffusion
    from lit_lora.callbacks import Preemption

    class Batches(LightningDataModule):
        cached = ("latents", "text")

        def train_dataloader(self) -> Any:
            mean = torch.randn(2, 4, 8, 8)
            batch = {
                "caption": ["a red seven", "a red star"],
                "target_size": torch.tensor([[16, 16]] * 2),
                "latents_mean": mean,
                "latents_std": torch.ones_like(mean),
                "text_embeddings": {"encoder_hidden_states": torch.randn(2, 77, 64)},
            }
            return torch.utils.data.DataLoader([batch] * 4 * processes, batch_size=None)  # type: ignore[arg-type]

    class Watch(Callback):
        """From the beginning of a step to that of the next: what other callbacks send counts too."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.profiler = torch.profiler.profile()
                self.profiler.__enter__()
                counter.__enter__()
            if batch_idx == 3:
                counter.__exit__(None, None, None)
                self.profiler.__exit__(None, None, None)
                sent = [event for event in self.profiler.events() or () if event.name.startswith("gloo:")]
                if len(sent) != len(counter.calls):
                    sys.exit(f"the profiler sees {len(sent)} collective calls, here are {len(counter.calls)}")

    counter = Counter()
    Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=_strategy(strategy, processes),
        gradient_clip_val=1.0,
        max_steps=4,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch(), Preemption()],
    ).fit(
        LoraDiffusion(
            StableDiffusion("embedded"),
            LoraConfig(r=8, lora_alpha=8),
            quantization=getattr(lit_lora.quantization, base)(),
        ),
        datamodule=Batches(),
    )
    return counter.calls


def _strategy(name: str, processes: int) -> Any:
    from lit_lora.distributed import LitLoraDeepSpeed, LitLoraFSDP

    if name == "hsdp":
        return LitLoraFSDP(shard_size=processes // 2)
    if not name.startswith("zero"):
        return name
    limits = {
        "stage3_param_persistence_threshold": _ZERO_SMALL["persistent"],
        "stage3_prefetch_bucket_size": _ZERO_SMALL["bucket"],
        "stage3_max_live_parameters": _ZERO_SMALL["live"],
    }
    return LitLoraDeepSpeed(stage=int(name[-1]), config={"zero_optimization": limits if name == "zero-3" else {}})


def _operation(name: str) -> str:
    name = name.rpartition("::")[2]
    kinds = {"allreduce": "all-reduce", "all_reduce": "all-reduce", "reduce_scatter": "reduce-scatter"}
    kinds |= {"allgather": "all-gather", "all_gather": "all-gather", "broadcast": "broadcast", "barrier": "barrier"}
    return next((kind for part, kind in kinds.items() if part in name), name)


def _purpose(operation: str) -> str:
    """What a call is for, by where it comes from."""
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
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


if __name__ == "__main__":
    main()
