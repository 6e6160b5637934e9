"""Tables that summarize a plan."""

from __future__ import annotations

import time

from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.batches.chunked_samples import ChunkedSamples
from lit_lora.datamodules.batches.plan import Plan, chunk_order
from lit_lora.datamodules.loading.dataset import ShardDataset, SlotRequest

_MOST_ROWS = 24
_PROBE_SAMPLES = 64
_PROBE_S = 2.0


def chunk_rows(plan: Plan, chunks: ChunkedSamples) -> list[list[str]]:
    """The chunks as a table, in the order of the first pass."""
    rows = [["chunk", "shards", "size", "samples", "batches", _leftover_name(plan)]]
    sizes = chunks.chunk_bytes
    order = chunk_order(plan.seed, 0, plan.num_chunks, plan.shuffle).tolist()
    for chunk in order[:_MOST_ROWS]:
        samples, batches = int(chunks.counts[chunk].sum()), int(plan.batches_per_round[chunk])
        left = abs(batches * plan.global_batch_size - samples)
        rows.append(
            [str(chunk), str(len(chunks.shards[chunk])), format_bytes(int(sizes[chunk]))]
            + [f"{number:,}" for number in (samples, batches, left)]
        )
    if len(order) > _MOST_ROWS:
        rows.append([f"({len(order) - _MOST_ROWS} more)", *[""] * 5])
    return rows


def bucket_rows(plan: Plan, chunks: ChunkedSamples) -> list[list[str]]:
    """The buckets as a table."""
    rows = [["size (h x w)", "samples", "share", "batches", _leftover_name(plan)]]
    for (height, width), counts in zip(chunks.sizes.tolist(), chunks.counts.T, strict=True):
        batches = int(plan.count_batches(counts).sum())
        left = abs(batches * plan.global_batch_size - int(counts.sum()))
        rows.append(
            [f"{height} x {width}", f"{counts.sum():,}", f"{counts.sum() / max(1, plan.num_samples):.1%}"]
            + [f"{number:,}" for number in (batches, left)]
        )
    return rows


def measure_reading(dataset: ShardDataset, plan: Plan) -> float:
    """Images per second that one process reads and decodes, measured on the first batches of the plan."""
    requests = []
    for batch, _ in plan.walk(plan.start()):
        for sample, slot in zip(batch.samples.tolist(), batch.slots.tolist(), strict=True):
            requests.append(SlotRequest(sample, 1.0, slot, batch.size))
        if len(requests) >= _PROBE_SAMPLES:
            break
    dataset.__getitems__(requests[:1])  # the first read loads libraries and indexes
    start, done = time.perf_counter(), 0
    for request in requests[:_PROBE_SAMPLES]:
        dataset.__getitems__([request])
        done += 1
        if time.perf_counter() - start > _PROBE_S:
            break
    return done / (time.perf_counter() - start)


def _leftover_name(plan: Plan) -> str:
    return "dropped" if plan.leftovers == "drop" else "padded"
