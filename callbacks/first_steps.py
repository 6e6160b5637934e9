"""What callbacks have in common that initialize LoRA by what its layers see in the first optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_lora.callbacks.changed_ranks import ChangedRanks
from lit_lora.distributed.resized import resizing
from lit_lora.errors import check_least


class FirstSteps(ChangedRanks, ABC):
    """Watches the LoRA layers in the first optimizer steps of the training itself, and initializes them after these.

    No data is read twice, with any datamodule, and resuming is exact, also before the layers are initialized.

    Args:
        steps: Number of optimizer steps that are looked at.

    Raises:
        UserError: If ``steps`` is below 1.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        check_least(1, steps=steps)
        self.steps = steps
        self.seen: dict[str, Any] = {}
        """What was seen of each layer, by its path; its ``state()`` is what a checkpoint holds."""
        self.restored: dict[str, Any] | None = None
        """States of a checkpoint by the layer's path; None if no checkpoint with this callback was loaded."""
        self.hooks: list[RemovableHandle] = []
        """Hooks that watch the layers."""
        self.done = False
        """Whether the layers are initialized."""
        self._step = 0

    @abstractmethod
    def watch(self, pl_module: LightningModule) -> None:
        """Check the layers, and fill :attr:`seen` and :attr:`hooks`."""

    @abstractmethod
    def initialize(self, trainer: Trainer, pl_module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        """Initialize the layers from :attr:`seen`, and drop their states from the optimizers; all processes call it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._remove_hooks()
        self.done, self.seen, self.restored = False, {}, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove_hooks()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if not self.done:
            self.check_start(trainer)
            self.find_layers(pl_module)
            self.watch(pl_module)

    def check_start(self, trainer: Trainer) -> None:
        """Refuse a start that the callback cannot follow; does nothing by default."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.done or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step >= self.steps:
            self._remove_hooks()
            with resizing(trainer.strategy) as optimizers:
                self.initialize(trainer, pl_module, optimizers)
            self.seen, self.done = {}, True
            self.changed(trainer, "on_adapter_replaced")

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "seen": {path: seen.state() for path, seen in self.seen.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = bool(state_dict["done"])
        self.restored = dict(state_dict["seen"])

    def _remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
