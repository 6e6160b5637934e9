"""Advice of the planner for a run that is out of memory."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer


def planned_advice(module: LightningModule, trainer: Trainer) -> list[tuple[str, int]] | None:
    """Options that save memory and the bytes that each would save alone, most first; None for a module that cannot be planned.

    Args:
        module: What is trained; a :class:`~lit_lora.LoraDiffusion` can be planned.
        trainer: Trainer of the run.

    Raises:
        UserError: If the datamodule does not say how large a batch or an image is.
    """
    # Imported here, because the profiler also works without diffusers' models.
    from lit_lora.callbacks.memory_limit import run_of
    from lit_lora.module import LoraDiffusion
    from lit_lora.planning.changes import ranked_changes

    if not isinstance(module, LoraDiffusion):
        return None
    return [(one.change.arguments, one.saved) for one in ranked_changes(run_of(module, trainer))]
