"""What to change in a run that needs too much memory."""

from __future__ import annotations

from collections.abc import Mapping


def general_advice(
    kinds: Mapping[str, int], full_precision: Mapping[str, int], unused: int, precision: str
) -> list[tuple[str, int]]:
    """Changes that make any run smaller, with what each would save about, alone.

    Args:
        kinds: Bytes of each kind of memory.
        full_precision: As :meth:`MemoryKinds.full_precision` gives it.
        unused: Bytes that the allocator has taken from the device and that hold no tensor.
        precision: The trainer's precision.

    Returns:
        Pairs of change and bytes, most first; without those that would save nothing.
    """
    frozen, elements = full_precision["frozen weights"], full_precision["frozen elements"]
    trained = kinds["gradients"] + kinds["optimizer state"]
    advice = [
        # Half a bit more: each block of weights has a scale.
        ("store the frozen weights in 4 bits (a quantised base)", frozen - elements * 9 // 16),
        ("store the frozen weights in 8 bits (a quantised base)", frozen - elements),
        ("store the frozen weights in 16 bits", frozen - 2 * elements),
        # Segments of a chain of blocks keep about a fifth.
        ("recompute activations in the backward pass (gradient checkpointing)", kinds["activations"] * 7 // 10),
        ("halve the batch size and double accumulate_grad_batches", kinds["activations"] // 2),
        (
            "keep the optimizer's state in 8 bits (bitsandbytes' or torchao's AdamW8bit)",
            full_precision["optimizer state"] * 3 // 4,
        ),
        ("let the optimizer step in the backward pass, so that gradients are freed at once", kinds["gradients"]),
        (
            "let the allocator give memory back: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before the start",
            unused,
        ),
    ]
    if precision == "32-true":
        advice.append(("compute in 16 bits (trainer.precision: bf16-mixed)", kinds["activations"] * 2 // 5))
    if kinds["adapter"] > kinds["frozen weights"]:
        advice.append(("train an adapter (LoRA) instead of most of the weights", trained * 9 // 10))
    return sorted_advice(advice)


def sorted_advice(advice: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Most saving first, without what saves nothing."""
    return sorted(((change, saved) for change, saved in advice if saved > 0), key=lambda pair: -pair[1])
