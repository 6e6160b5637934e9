"""A custom callback: the training loss of every n-th step in a file that a resumed run continues.

With this file on PYTHONPATH, a config names it:

    trainer:
      callbacks+:
        - class_path: my_callback.LossHistory
          init_args: {every_n_steps: 10}
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_lora import UserError
from lit_lora.distributed.collectives import gather
from lit_lora.files import atomic_file


class LossHistory(Callback):
    """Writes ``losses.csv`` to the log folder: optimizer step, mean loss of all processes, number of samples.

    It works with any LightningModule whose ``training_step`` returns a loss or a dict with one.

    Args:
        every_n_steps: Optimizer steps between two rows; defaults to 50.

    Raises:
        UserError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.rows: list[tuple[int, float, int]] = []
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # With accumulated gradients several batches belong to one optimizer step.
        if step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        loss = (outputs["loss"] if isinstance(outputs, dict) else outputs).item()
        count = int((batch["weight"] > 0).sum()) if "weight" in batch else len(batch["caption"])
        # All processes come here at the same step, which a collective call needs.
        losses, counts = zip(*gather((loss, count)), strict=True)
        self.rows.append((step, sum(losses) / len(losses), sum(counts)))

    def on_train_chunk_end(self, trainer: Trainer, pl_module: LightningModule, chunk: int) -> None:
        """Write the file at the end of each chunk of the data; ``DataProgress`` calls this."""
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The rows, which Lightning saves in each checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [tuple(row) for row in state_dict["rows"]]

    def _write(self, trainer: Trainer) -> None:
        # Asking for the log folder is a collective call too, so the check of the rank comes after it.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        with atomic_file(folder / "losses.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss", "samples"])
            writer.writerows(self.rows)
