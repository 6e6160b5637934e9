"""Advice for runs that need too much memory."""

from __future__ import annotations

from collections.abc import Mapping


def general_advice(
    kinds: Mapping[str, int], full_precision: Mapping[str, int], unused: int, precision: str
) -> list[tuple[str, int]]:
    """Changes that save memory in any run, with the approximate bytes that each saves by itself.

    Args:
        kinds: Bytes of each kind of memory.
        full_precision: Result of :meth:`MemoryKinds.full_precision`.
        unused: Bytes that the allocator has reserved but that hold no tensor.
        precision: Precision of the trainer.

    Returns:
        Pairs of a change and the bytes it saves, largest first, without changes that save nothing.
    """
    frozen, elements = full_precision["frozen weights"], full_precision["frozen elements"]
    trained = kinds["gradients"] + kinds["optimizer state"]
    advice = [
        # 4.5 bits: each block of weights has a scale.
        ("store the frozen weights in 4 bits (a quantized base)", frozen - elements * 9 // 16),
        ("store the frozen weights in 8 bits (a quantized base)", frozen - elements),
        ("store the frozen weights in 16 bits", frozen - 2 * elements),
        # Assumes that the inputs of all blocks and the activations of one block are three tenths.
        ("recompute activations in the backward pass (gradient checkpointing)", kinds["activations"] * 7 // 10),
        ("halve the batch size and double accumulate_grad_batches", kinds["activations"] // 2),
        (
            "keep the optimizer's state in 8 bits (bitsandbytes' or torchao's AdamW8bit)",
            full_precision["optimizer state"] * 3 // 4,
        ),
        ("step the optimizer in the backward pass, so that gradients are freed at once", kinds["gradients"]),
        (
            "reduce fragmentation: start with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
            unused,
        ),
    ]
    if precision == "32-true":
        advice.append(("compute in 16 bits (trainer.precision: bf16-mixed)", kinds["activations"] * 2 // 5))
    if kinds["adapter"] > kinds["frozen weights"]:
        advice.append(("train an adapter (LoRA) instead of most of the weights", trained * 9 // 10))
    return sorted_advice(advice)


def sorted_advice(advice: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The changes in order of the bytes they save, largest first, without those that save nothing."""
    return sorted(((change, saved) for change, saved in advice if saved > 0), key=lambda pair: -pair[1])
