"""What callbacks have in common that initialize LoRA by what its layers see in the first optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_lora.callbacks.changed_ranks import ChangedRanks
from lit_lora.callbacks.first_values import check_no_start, check_untrained
from lit_lora.distributed.resized import resizing
from lit_lora.errors import UserError, check_whole


class FirstSteps(ChangedRanks, ABC):
    """Watches the LoRA layers in the first optimizer steps of the training itself, and initializes them after these.

    No data is read twice, with any datamodule, and resuming is exact, also before the layers are initialized.

    Args:
        steps: Number of optimizer steps that are looked at.

    Raises:
        UserError: If ``steps`` is below 1; when training starts, if it ends within the steps, the adapter has values already,
            or a checkpoint without this callback is resumed.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        check_whole(1, steps=steps)
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
        if self.done:
            return
        self._check_length(trainer.estimated_stepping_batches)
        if trainer.global_step and self.restored is None:
            raise UserError(
                f"the checkpoint of step {trainer.global_step} was saved without {type(self).__name__}, which begins with the "
                f"first step; remove it from trainer.callbacks, or start without ckpt_path"
            )
        self.find_layers(pl_module)
        if self.restored is None:
            check_untrained(self.layers, type(self).__name__)
        self.watch(pl_module)

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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.done:
            rank_zero_warn(
                f"training has ended at step {trainer.global_step}, and {type(self).__name__} initializes the adapter at step "
                f"{self.steps}: what was saved is not initialized; resume the run from its checkpoint, or lower steps"
            )

    def warn_of_left_out(self, known: Collection[str]) -> None:
        """Warn of layers that were not initialized.

        Args:
            known: Paths of those that were.
        """
        if left := [layer.name for layer in self.layers if layer.path not in known]:
            rank_zero_warn(
                f"{type(self).__name__} has seen too few rows, or zeros or NaN alone, for {len(left)} of {len(self.layers)} "
                f"layers, the first is {left[0]}: they begin as plain LoRA; raise steps or the batch size, or leave them out of "
                f"target_modules"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "seen": {path: seen.state() for path, seen in self.seen.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = bool(state_dict["done"])
        self.restored = dict(state_dict["seen"])

    def _check_run(self, trainer: Trainer, module: Any) -> None:
        check_no_start(module, type(self).__name__)
        if trainer.max_steps > 0:
            self._check_length(trainer.max_steps)

    def _check_length(self, length: float) -> None:
        if length <= self.steps:
            raise UserError(
                f"{type(self).__name__} initializes the adapter after steps={self.steps} optimizer steps, and training ends "
                f"after {int(length)}, so that it would not be trained; lower steps, or raise trainer.max_steps or "
                f"trainer.max_epochs"
            )

    def _remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
