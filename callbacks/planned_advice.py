"""The planner's advice for a run that ran out of memory."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer


def planned_advice(module: LightningModule, trainer: Trainer) -> list[tuple[str, int]] | None:
    """Changes that save memory, each with the bytes that it alone would save, largest first.

    Args:
        module: Module that is trained.
        trainer: Trainer of the run.

    Returns:
        The changes; None if the module is not a :class:`~lit_lora.LoraDiffusion`, which alone can be planned.

    Raises:
        UserError: If the datamodule does not state its batch size or image size.
    """
    # Imported here, since the profiler also works without diffusers' models.
    from lit_lora.callbacks.memory_limit import run_of
    from lit_lora.module import LoraDiffusion
    from lit_lora.planning.changes import ranked_changes

    if not isinstance(module, LoraDiffusion):
        return None
    return [(one.change.description, one.saved) for one in ranked_changes(run_of(module, trainer))]
