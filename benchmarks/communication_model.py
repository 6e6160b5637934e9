"""A model of the strategies: which collective calls a training step makes, what they cost, and what each process keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

STRATEGIES = ("ddp", "lit_lora_fsdp", "hsdp", "zero-1", "zero-2", "zero-3")
"""Names of the strategies: ``hsdp`` is ``lit_lora_fsdp`` with a ``shard_size``, ``zero-1`` is ``lit_lora_deepspeed_stage_1``,
and so on."""
ADAPTER_BYTES = 4
"""Bytes of one element of the adapter and of its gradient."""
_ADAMW_BYTES = 8
"""Bytes of AdamW's state for one element."""
_DDP_BUCKETS = (1 << 20, 25 << 20)
"""Bytes of DDP's first bucket of gradients and of each further bucket."""
_ZERO_BUCKET = 10_000_000
"""Elements of a bucket in ``LitLoraDeepSpeed``."""
_ZERO_PERSISTENT = 100_000
"""Largest number of elements of a parameter that ZeRO-3 does not shard; it gathers these after each step."""


class Weight(NamedTuple):
    """One parameter as it is stored."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def padded(self, n: int, rows: bool) -> int:
        """Bytes after padding to n equal shards, of whole rows (FSDP2) or of single elements (ZeRO-3)."""
        if not rows:
            return math.ceil(self.count / n) * n * self.itemsize
        return math.ceil(self.shape[0] / n) * n * math.prod(self.shape[1:]) * self.itemsize


class Call(NamedTuple):
    """Collective calls of one kind, with the sum of their payloads in bytes."""

    operation: str
    what: str
    payload: int
    calls: int = 1
    among: str = "all"
    """Participants: ``all`` processes, the processes of one ``node``, or the ``replicas`` of a shard, one in each node."""


class Cost(NamedTuple):
    """Cost of a step for each process."""

    inside: float
    """Bytes sent to processes of the same node."""
    across: float
    """Bytes sent to other nodes."""
    seconds: float
    """Duration of all calls, one after the other."""


@dataclass(frozen=True)
class Network:
    """Bandwidths and latencies of a cluster, for each GPU and one direction."""

    gpus_per_node: int
    inside: float
    """GB/s to other GPUs of the node."""
    across: float
    """GB/s of the GPU's network card."""
    call_latency: float
    """Microseconds to start a collective call."""
    hop_inside: float
    """Microseconds of a hop of the ring inside a node."""
    hop_across: float
    """Microseconds of a hop of the ring between nodes."""

    def cost(self, calls: Sequence[Call], gpus: int) -> Cost:
        """Cost of calls on rings; as many rings run through each node as it has GPUs, each with a network card of its own."""
        inside = across = seconds = 0.0
        nodes = math.ceil(gpus / self.gpus_per_node)
        for call in calls:
            size, hops_across = {
                "all": (gpus, nodes - 1),
                "node": (min(gpus, self.gpus_per_node), 0),
                "replicas": (nodes, nodes - 1),
            }[call.among]
            sent = call.payload * sent_share(call.operation, size)
            # Each ring leaves a node at one of its GPUs; all hops of a ring of replicas are between nodes.
            share = 0.0 if not hops_across else 1.0 if call.among == "replicas" else 1 / self.gpus_per_node
            inside, across = inside + sent * (1 - share), across + sent * share
            seconds += max(sent * (1 - share) / (self.inside * 1e9), sent * share / (self.across * 1e9))
            hops = hops_across * self.hop_across + (size - 1 - hops_across) * self.hop_inside
            rounds = 2 if call.operation == "all-reduce" else 1
            seconds += call.calls * (self.call_latency + rounds * hops) / 1e6
        return Cost(inside, across, seconds)


def sent_share(operation: str, n: int) -> float:
    """Share of the payload that each of n processes sends on a ring."""
    return (2 if operation == "all-reduce" else 0 if operation == "barrier" else 1) * (n - 1) / n


def predict(
    strategy: str, groups: Sequence[Sequence[Weight]], n: int, zero: dict[str, int] | None = None
) -> list[Call]:
    """Predict the collective calls of one step.

    Args:
        strategy: One of :data:`STRATEGIES`.
        groups: The weights of each block, followed by those outside the blocks.
        n: Number of processes that the weights or the optimizer state are sharded over.
        zero: Limits of ZeRO-3 in elements, ``persistent`` and ``bucket``. Defaults to those of ``LitLoraDeepSpeed``.
    """
    trained = [weight for group in groups for weight in group if weight.trained]
    gradients = sum(weight.count for weight in trained) * ADAPTER_BYTES
    if strategy == "ddp":
        first, other = _DDP_BUCKETS
        return [Call("all-reduce", "gradients", gradients, 1 + math.ceil(max(0, gradients - first) / other))]
    if strategy in ("zero-1", "zero-2"):
        buckets = math.ceil(gradients / ADAPTER_BYTES / _ZERO_BUCKET)
        return [Call("all-reduce", "gradients", gradients, buckets), Call("all-gather", "weights", gradients, buckets)]
    if strategy == "zero-3":
        return list(_zero_3([weight for group in groups for weight in group], n, zero or {}))
    among = "node" if strategy == "hsdp" else "all"
    gathered = sum(weight.padded(n, rows=True) for group in groups for weight in group)
    trained_groups = [[weight for weight in group if weight.trained] for group in groups]
    reduced = sum(weight.padded(n, rows=True) for group in trained_groups for weight in group)
    with_trained = sum(bool(group) for group in trained_groups)
    calls = [
        Call("all-gather", "weights", 2 * gathered, 2 * len(groups), among),
        Call("reduce-scatter", "gradients", reduced, with_trained, among),
    ]
    return (
        [*calls, Call("all-reduce", "gradients", reduced // n, with_trained, "replicas")] if among == "node" else calls
    )


def _zero_3(weights: Sequence[Weight], n: int, limits: dict[str, int]) -> Iterator[Call]:
    """Calls of ZeRO-3.

    Large weights are gathered in buckets for the forward and again for the backward pass, small weights one by one after the
    step.
    """
    small = [w for w in weights if w.count <= limits.get("persistent", _ZERO_PERSISTENT)]
    large = [w for w in weights if w.count > limits.get("persistent", _ZERO_PERSISTENT)]
    bucket = limits.get("bucket", _ZERO_BUCKET)
    # A weight that does not fit into a bucket is gathered in a call of its own.
    calls = sum(min(1, w.count / bucket) for w in large)
    yield Call("all-gather", "weights", 2 * sum(w.padded(n, rows=False) for w in large), 2 * math.ceil(calls))
    yield Call("all-gather", "small weights", sum(w.padded(n, rows=False) for w in small), len(small))
    trained = [w for w in weights if w.trained]
    buckets = math.ceil(sum(w.count for w in trained) / _ZERO_BUCKET)
    yield Call("reduce-scatter", "gradients", sum(w.padded(n, rows=False) for w in trained), buckets)


def kept_bytes(strategy: str, groups: Sequence[Sequence[Weight]], n: int) -> int:
    """Bytes of base, adapter and AdamW's state that each process keeps between two steps.

    Args:
        strategy: One of :data:`STRATEGIES`.
        groups: The weights of each block, followed by those outside the blocks.
        n: Number of processes that the weights or the optimizer state are sharded over.
    """
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
    shards = sum(weight.padded(n, rows=True) for weight in weights) // n
    return shards + sum(w.padded(n, rows=True) for w in weights if w.trained) // n * _ADAMW_BYTES // ADAPTER_BYTES
