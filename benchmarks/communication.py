"""Bytes that a training step sends under each strategy: ``python benchmarks/communication.py``.

The first table counts. Several processes train the embedded base with LoRA over gloo on the CPU, on latents and text embeddings
as a cache provides them. Torch's dispatcher records every collective call of one step with its payload, and the profiler has to
see the same number of calls. Beside the counts are the predictions of a model of the strategies.

The second table holds predictions only, for large denoisers on many GPUs: the bytes that each process sends in a step, inside
its node and to others, how long this takes if nothing overlaps with computation, and how many bytes of weights and optimizer
state each GPU keeps. Bandwidths and latencies are options. Nothing in this table is measured.

The payload is the whole tensor that is reduced, or that all processes have after an all-gather. On a ring of n processes each
process sends (n-1)/n of it in an all-gather, a reduce-scatter or a broadcast, and twice that in an all-reduce.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings

from communication_count import count_calls
from communication_model import ADAPTER_BYTES, STRATEGIES, Call, Cost, Network, kept_bytes, predict, sent_share
from denoiser_weights import embedded, flux, sdxl
from environment import cpu_cores, versions
from fresh_processes import results_of_processes

RUNS = (
    ("ddp", "Dense"),
    ("lit_lora_fsdp", "Dense"),
    ("lit_lora_fsdp", "NF4"),
    ("hsdp", "Dense"),
    ("zero-1", "Dense"),
    ("zero-2", "Dense"),
    ("zero-3", "Dense"),
)
"""Strategies and quantizations that are counted by default."""

BASES = ("Dense", "Int8", "NF4")
_SMALL_ZERO_3 = {"persistent": 2_000, "bucket": 13_000, "live": 65_000}
"""Limits of ZeRO-3 for the embedded base, which is smaller than the default bucket; this bucket holds 1/260 of the weights, as
the default bucket does of SDXL's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="number of processes of a counted run")
    parser.add_argument("--strategies", nargs="*", choices=STRATEGIES, help="strategies to count, with each of --bases")
    parser.add_argument(
        "--bases", nargs="*", choices=BASES, default=("Dense",), help="quantizations of the base to count"
    )
    parser.add_argument("--gpus", nargs="*", type=int, default=(8, 64, 512), help="numbers of GPUs to predict for")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--inside", type=float, default=450, help="GB/s of a GPU to others of its node, one direction")
    parser.add_argument("--across", type=float, default=50, help="GB/s of a GPU's own network card, one direction")
    parser.add_argument("--call-latency", type=float, default=20, help="microseconds to start a collective call")
    parser.add_argument("--hop-inside", type=float, default=1, help="microseconds of a hop of the ring inside a node")
    parser.add_argument("--hop-across", type=float, default=5, help="microseconds of a hop between nodes")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a counted run may take")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.run:
        print(json.dumps(count_calls(*options.run, options.processes, _SMALL_ZERO_3)))
        return
    print(f"{versions('torch', 'lightning', 'deepspeed', 'diffusers', 'peft')}; {cpu_cores()}\n")
    _print_counts(options)
    if not options.strategies:
        _print_predictions(options)


def _print_counts(options: argparse.Namespace) -> None:
    n = options.processes
    print(
        f"Counted: one step of the embedded base, LoRA r=8, bfloat16, {n} processes (gloo), bytes of each process; hsdp: two"
        f" times {n} processes.\nzero-3 with limits that are as much smaller as the model, in elements: {_SMALL_ZERO_3}.\n"
        "What the model leaves out: FSDP2 does not gather a block before the first adapter again, zero-3 keeps weights near the"
        " turn from\nforward to backward."
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
        found = [Call(*call) for call in results_of_processes(arguments, count, options.timeout, environment)[0]]
        groups = embedded(base)
        predicted = {(c.operation, c.what): c for c in predict(strategy, groups, n, _SMALL_ZERO_3)}
        keys = {(c.operation, c.what) for c in found} | predicted.keys()
        for key in sorted(keys, key=lambda key: (key not in predicted, key)):
            counted = [call for call in found if (call.operation, call.what) == key]
            payload, expected = sum(call.payload for call in counted), predicted.get(key)
            among = expected.among if expected else "all"
            sent = payload * sent_share(key[0], {"node": n, "replicas": 2, "all": count}[among])
            line = f"{strategy:<14} {base:<6} {key[0]:<15} {key[1]:<22} {len(counted):>6} {payload:>11,} {sent:>11,.0f}"
            if expected:
                differs = expected.payload / payload - 1 if payload else math.inf
                line += f" {expected.calls:>6} {expected.payload:>11,} {differs:>8.1%}"
            print(line, flush=True)
        if strategy == "ddp":
            adapter = sum(w.count for group in groups for w in group if w.trained) * ADAPTER_BYTES
            reduced = sum(call.payload for call in found if call.what == "gradients")
            others = max(call.payload for call in found if call.what != "gradients")
            print(
                f"{'':<14} the adapter's gradients are {adapter:,} bytes, {reduced:,} are reduced; no other call sends more"
                f" than {others} bytes: the frozen base is not sent"
            )


def _print_predictions(options: argparse.Namespace) -> None:
    network = Network(
        options.gpus_per_node,
        options.inside,
        options.across,
        options.call_latency,
        options.hop_inside,
        options.hop_across,
    )
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
                    one, bytes_kept = network.cost(calls, gpus), kept_bytes(strategy, groups, n)
                    found[name, base, gpus, strategy] = one, bytes_kept
                    print(
                        f"{gpus:>5} {strategy:<14} {sum(call.calls for call in calls):>6} {one.inside / 1e6:>10,.0f}"
                        f" {one.across / 1e6:>10,.0f} {one.seconds:>8.3f} {bytes_kept / 1e9:>8.2f}",
                        flush=True,
                    )
    _print_conclusions(found, max(options.gpus), node)


def _print_conclusions(found: dict[tuple[str, str, int, str], tuple[Cost, int]], gpus: int, node: int) -> None:
    def result(strategy: str, model: str = "FLUX.1-dev", base: str = "Dense") -> str:
        one, bytes_kept = found[model, base, gpus, strategy]
        return f"{(one.inside + one.across) / 1e9:.2f} GB sent, {one.seconds:.2f} s, {bytes_kept / 1e9:.1f} GB kept"

    print(
        f"\nWhere the base fits on a GPU beside the activations, ddp: it sends the adapter's gradients alone. On {gpus} GPUs:\n"
        f"  SDXL in bfloat16: {result('ddp', 'SDXL')}\n  FLUX.1-dev in NF4: {result('ddp', base='NF4')}\n"
        "zero-1 and zero-2 send half as much again and save AdamW's state, of which an adapter has little."
    )
    if gpus > node:
        print(
            "Where it does not fit, lit_lora_fsdp, on several nodes with shard_size: node, which sends no weights over the"
            " network."
            f"\n  FLUX.1-dev in bfloat16: {result('hsdp')}; with one copy on all GPUs: {result('lit_lora_fsdp')}\n"
            "One copy on hundreds of GPUs also fills the 16 rows of a LoRA matrix up to one for each GPU. zero-3 gathers its"
            f"\nsmall weights one by one after each step, so that calls take most of the time: {result('zero-3')}."
        )


if __name__ == "__main__":
    main()
