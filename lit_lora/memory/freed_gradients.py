"""Gradients that are freed as soon as the optimizer has used them."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy


def free_gradients(trainer: Trainer) -> None:
    """Free the gradients of an optimizer step that is over.

    Lightning frees them after the next forward pass: they would stay through validation and while the activations grow.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return  # its engine frees them
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
