"""A ``ModelCheckpoint`` whose resumed runs finish what a killed one has left undone."""

from __future__ import annotations

import copy
import os
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_lora.callbacks.checkpoint_content import check_hyperparameters
from lit_lora.callbacks.checkpoint_files import (
    copy_with_folders,
    link_with_folders,
    modified,
    warn_if_nothing_is_saved,
    warn_of_future,
)
from lit_lora.loops import begins_anew
from lit_lora.run_checks import check_other_callbacks

_OF_ONE_RUN = (
    "best_k_models",
    "best_model_path",
    "best_model_score",
    "current_score",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
    "_defer_save_until_validation",
    "_earlier_best",
    "_last_checkpoint_saved",
    "_last_global_step_saved",
    "_replaced",
)
"""What a ``ModelCheckpoint`` knows of the checkpoints that it has saved."""


class ResumedSaves(ModelCheckpoint):
    """A :class:`~lightning.pytorch.callbacks.ModelCheckpoint` that a run can be resumed from wherever it was killed.

    ``ckpt_path="last"`` finds the newest checkpoint, also of earlier runs. A run that is resumed from it removes the checkpoint
    which that one was to replace, and brings ``last`` up to it. A run that is resumed in another folder begins to look for the
    best checkpoint anew; its end tells if that of the folders before is better. So does a second fit with the same callback,
    which would otherwise save nothing at the step of the last save before, and remove checkpoints of the first.
    """

    _replaced = ""
    """The checkpoint that the next one replaces; a run that is killed in between leaves its removal to the resumed run."""
    _found: AbstractSet[str] = frozenset()
    """The checkpoints that ``ckpt_path="last"`` has found."""
    _trains = False
    _fresh: dict[str, Any] | None = None
    """What the callback knew before its first run."""
    _folders: tuple[Any, Any] = (None, None)
    """The ``dirpath`` that was given, and the one that became of it."""
    _earlier_best: tuple[str, Tensor] | None = None
    """The best checkpoint in the folders of the runs before, and its score."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._fresh is None:
            self._fresh = {name: copy.copy(getattr(self, name)) for name in _OF_ONE_RUN}
        elif stage == "fit" and begins_anew(trainer):
            vars(self).update({name: copy.copy(value) for name, value in self._fresh.items()})
            if trainer.ckpt_path is None and self.dirpath == self._folders[1]:
                self.dirpath = self._folders[0]
        given = self.dirpath
        super().setup(trainer, pl_module, stage)
        if given != self.dirpath:
            self._folders = given, self.dirpath
        self._trains = False
        if stage == "fit":
            warn_if_nothing_is_saved(self)
            check_other_callbacks(trainer, StochasticWeightAveraging, WeightAveraging)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_hyperparameters(trainer)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"replaced": self._replaced, "earlier_best": self._earlier_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        is_here = self.dirpath == state_dict.get("dirpath")
        self._replaced = state_dict.get("replaced", "") if is_here else ""
        self._earlier_best = state_dict.get("earlier_best")
        score = state_dict.get("best_model_score")
        if (
            not is_here
            and score is not None
            and (self._earlier_best is None or self._is_better(score, self._earlier_best[1]))
        ):
            self._earlier_best = state_dict["best_model_path"], score

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._trains = True
        if trainer.ckpt_path is not None:
            self._finish_last_save(trainer, str(trainer.ckpt_path))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the last save of a run that was killed at its end: nothing is left to train, and so nothing is saved."""
        super().on_fit_end(trainer, pl_module)
        self._tell_earlier_best()
        if not self._trains:
            rank_zero_info(f"nothing was trained: {_bound(trainer)}")
        resumed = str(trainer.ckpt_path)
        if self._trains or resumed not in self._found or not self._is_inside(resumed):
            return
        if getattr(trainer, "fast_dev_run", False):
            return
        self._finish_last_save(trainer, resumed)
        if self.save_last and trainer.is_global_zero:
            self._update_last(trainer, os.path.realpath(resumed))

    def _is_better(self, score: Tensor, other: Tensor) -> bool:
        other = other.to(score.device)
        return bool(score < other if self.mode == "min" else score > other)

    def _tell_earlier_best(self) -> None:
        """Warn that the best checkpoint is not among those that this run has saved."""
        if self._earlier_best is None or self.best_model_score is None:
            return
        path, score = self._earlier_best
        if self._is_better(score, self.best_model_score) and ("://" in path or os.path.exists(path)):
            rank_zero_warn(
                f"the best {self.monitor} is {float(score):.4g}, that of {path}, saved before this run was resumed; since "
                f"then it is {float(self.best_model_score):.4g}, that of {self.best_model_path}"
            )

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._replaced = self.best_model_path if self.save_top_k == 1 else ""
        super()._save_none_monitor_checkpoint(trainer, monitor_candidates)
        self._replaced = ""

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._replaced = self.kth_best_model_path if 0 < len(self.best_k_models) == self.save_top_k else ""
        super()._update_best_and_save(current, trainer, monitor_candidates)
        self._replaced = ""

    def _finish_last_save(self, trainer: Trainer, resumed: str) -> None:
        """What a killed run had still to do after it had saved the checkpoint that this run was resumed from."""
        if "://" in str(self.dirpath):
            return
        saved = os.path.realpath(resumed)
        if not self.last_model_path:  # the first checkpoint is written before its link
            last = self.format_checkpoint_name(self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST)
            is_ours = os.path.islink(last) and os.path.realpath(last) == saved
            self.last_model_path = trainer.strategy.broadcast(last if is_ours else "")
        replaced, self._replaced = self._replaced, ""
        if not replaced or os.path.realpath(replaced) == saved or modified(replaced) > modified(saved):
            return  # a later checkpoint may have got the name of the replaced one
        if self._should_remove_checkpoint(trainer, replaced, saved):
            self._last_checkpoint_saved = saved  # where a link to the replaced checkpoint will point
            self._remove_checkpoint(trainer, replaced)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        # ModelCheckpoint keeps the checkpoint that the run was resumed from. One that "last" has found is the run's own.
        if previous != current and previous == str(trainer.ckpt_path) and previous in self._found:
            return self._is_inside(previous)
        removed: bool = super()._should_remove_checkpoint(trainer, previous, current)
        return removed

    def _is_inside(self, path: str) -> bool:
        return Path(str(self.dirpath)).absolute() in Path(path).absolute().parents

    def _update_last(self, trainer: Trainer, saved: str) -> None:
        """Make ``last`` what it would have become after this checkpoint was saved."""
        last = self.last_model_path
        if not last:
            last = self.format_checkpoint_name(self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST)
            if os.path.lexists(last):
                return  # of another run
        if os.path.realpath(last) == saved or modified(last) >= modified(saved):
            return
        if self.save_last == "link":
            link_with_folders(saved, last)
        else:
            copy_with_folders(saved, last)
        self.last_model_path = last

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Candidates for ``ckpt_path="last"``; without a ``dirpath`` also those in the ``version_N`` folders of earlier runs.

        TensorBoard and CSV give every run a new one, so ModelCheckpoint would find nothing there and start over. The newest of
        all counts, since a killed run may not have written its ``last`` yet.
        """
        found: set[str] = super()._find_last_checkpoints(trainer)
        found = {name for name in found if "://" in name or os.path.exists(name)}  # without links to what is gone
        pattern = "*.ckpt" if self.save_last else f"{self.CHECKPOINT_NAME_LAST}*.ckpt"
        if found:
            folders = {Path(name).parent for name in found}
            pattern = "*.ckpt"
        elif self.dirpath is not None:
            folders = set() if "://" in str(self.dirpath) else {Path(self.dirpath)}
        else:
            # The names of other loggers' runs are not known on all processes.
            versions = isinstance(trainer.logger, TensorBoardLogger | CSVLogger) and trainer.log_dir
            folders = set(Path(versions).parent.glob("version_*/checkpoints")) if versions else set()
        self._found = found | {str(path) for folder in folders for path in folder.glob(pattern) if path.exists()}
        warn_of_future(self._found)
        return self._found


def _bound(trainer: Trainer) -> str:
    """Why a run has ended before its first step."""
    if trainer.limit_train_batches == 0:
        return "trainer.limit_train_batches is 0"
    step, epoch = trainer.global_step, trainer.current_epoch
    if 0 <= trainer.max_steps <= step:
        return f"the run began at step {step}, and trainer.max_steps={trainer.max_steps} is not above that; raise it"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch:
        return f"the run began after {epoch} epochs, and trainer.max_epochs={trainer.max_epochs} is not above that; raise it"
    if trainer.should_stop:
        return "a callback stopped the run before its first step, as trainer.max_time does once its time is used up"
    return "there are no training batches"
