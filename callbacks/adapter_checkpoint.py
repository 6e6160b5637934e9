"""Checkpoints that hold only the adapter, with the adapter's files beside them."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_lora.adapters import (
    TrainingState,
    adapter_keys,
    check_adapter_config,
    check_adapter_state,
    check_finite,
    keep_only_adapter,
    plain_config,
)
from lit_lora.callbacks.adapter_ema import AdapterEMA
from lit_lora.callbacks.finite_gradients import FiniteGradients
from lit_lora.distributed import shards_weights
from lit_lora.distributed.collectives import gather
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, link, restore_replaced, sync, writable_folder
from lit_lora.finite import non_finite_names, tensors_in
from lit_lora.folder_lock import FolderLock
from lit_lora.loops import accumulating, within_epoch
from lit_lora.optimizer_settings import ResumedOptimizers, optimizer_names
from lit_lora.random_state import random_state, set_random_state

_CLOCKS_DIFFER_S = 300.0


class AdapterCheckpoint(ModelCheckpoint):
    """A :class:`~lightning.pytorch.callbacks.ModelCheckpoint` with all its options that saves only the adapter.

    A checkpoint holds the weights of the adapter, everything else that training changes, such as running statistics of BatchNorm
    (:class:`~lit_lora.adapters.training_state.TrainingState`), the state of optimizer, loops and datamodule, and the random
    number generators of every process. If the module has ``save_adapter(folder)``, as :class:`~lit_lora.LoraDiffusion` has, the
    folder
    ``NAME.adapter`` beside ``NAME.ckpt`` holds the same adapter as files of PEFT and diffusers, and with :class:`AdapterEMA`
    ``NAME.ema.adapter`` holds its average. Checkpoints and folders are written atomically.

    All checkpoints are taken between two optimizer steps: what is due in the middle of accumulated gradients waits for the next
    step, and so does the end of training. Every end of training is saved, ``last`` is always the newest checkpoint, and weights
    or optimizer states that are NaN or Inf are never written.

    Resuming is exact, bit for bit on the same device and number of processes, with ``WebDatasetDataModule`` and with every
    loader that has ``state_dict`` and ``load_state_dict``. A plain ``DataLoader`` has none: Lightning starts it over, so that
    samples of the epoch are repeated.

    It works with any LightningModule that has PEFT layers or frozen parameters. Resuming with another adapter raises
    :class:`~lit_lora.UserError`.

    Args:
        *args: Arguments of ``ModelCheckpoint``.
        keep_optimizer_settings: Whether a resumed run goes on with the checkpoint's lr, weight decay and other settings of
            optimizer and schedule; false applies those of this run. Defaults to true, with a warning if they differ.
        save_on_chunk_end: Also save after the optimizer step that ends a chunk of the training data; off by default.
        **kwargs: Keyword arguments of ``ModelCheckpoint``.
    """

    def __init__(
        self, *args: Any, save_on_chunk_end: bool = False, keep_optimizer_settings: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.keep_optimizer_settings = keep_optimizer_settings
        self.save_on_chunk_end = save_on_chunk_end
        self._is_due = False
        """Whether a checkpoint waits for the next optimizer step."""
        self._stop_is_due = False
        self._first_step = 0
        self._step_of_last: int | None = None
        """The optimizer step that ``last`` was saved at."""
        self._replaced = ""
        """The checkpoint that the next one replaces; a run that is killed in between leaves its removal to the resumed run."""
        self._lock: FolderLock | None = None
        self._found: set[str] = set()
        """The checkpoints that ``ckpt_path="last"`` has found."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and "://" not in str(self.dirpath):
            folder = writable_folder(str(self.dirpath))
            self._lock = FolderLock(folder)
            if other := self._lock.take():
                rank_zero_warn(
                    f"{other} saves its checkpoints in {folder} too, and one run may replace or resume from those of the other; "
                    f"end one of them, or give each its own dirpath"
                )
            else:
                _tidy(folder)
        pl_module.strict_loading = False
        self._trains = False
        self._saved_rng: list[dict[str, Any]] | None = None
        self._unfrozen: list[str] = []
        self._resumed: ResumedOptimizers | None = None
        # partial: torch sets attributes on hooks, which methods do not take.
        self._hooks: list[RemovableHandle] = [
            pl_module.register_state_dict_post_hook(partial(self._keep_training_state)),
            pl_module.register_load_state_dict_pre_hook(partial(self._check_loaded)),
        ]
        self._state: TrainingState | None = None
        self._filters = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._state = self._state or TrainingState(pl_module)
        if self._resumed is not None:
            self._resumed.compare(trainer)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"replaced": self._replaced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._replaced = state_dict.get("replaced", "") if self.dirpath == state_dict.get("dirpath") else ""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._lock is not None:
            self._lock.release()
        super().teardown(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["lit_lora"] = {
            "adapters": _adapter_configs(pl_module),
            "rng": gather(random_state()),
            "optimizers": optimizer_names(trainer),
            "unfrozen": [] if self._state is None else self._state.unfrozen(pl_module),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        ours = checkpoint.get("lit_lora", {})
        here = _adapter_configs(pl_module)
        for name, saved in ours.get("adapters", {}).items():
            check_adapter_config(here.get(name, {}), saved)
        self._saved_rng = ours.get("rng")
        self._unfrozen = ours.get("unfrozen", [])
        states = checkpoint.get("optimizer_states", [])
        check_finite(tensors_in(states))
        # With optimizers there, this is the tuner, which restores what it has saved itself.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.optimizers:
            self._resumed = ResumedOptimizers(ours.get("optimizers", []), checkpoint, self.keep_optimizer_settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._trains = True
        self._is_due = self._stop_is_due = False
        self._first_step, self._step_of_last = trainer.global_step, None
        if self._resumed is not None:
            self._resumed.apply(trainer)
            self._resumed = None
        # Lightning's finetuning callbacks freeze all layers at the start and restore the optimizer's parameters alone.
        named = dict(pl_module.named_parameters())
        for name in self._unfrozen:
            named[name].requires_grad_(True)
        self._unfrozen = []
        if trainer.ckpt_path is not None:
            self._finish_last_save(trainer, str(trainer.ckpt_path))
        if self._saved_rng is None:
            return
        if len(self._saved_rng) == trainer.world_size:
            set_random_state(self._saved_rng[trainer.global_rank])
        else:
            rank_zero_warn(
                f"the checkpoint was saved by {len(self._saved_rng)} processes and this run has {trainer.world_size}, so dropout "
                f"does not continue the random numbers of that run"
            )
        self._saved_rng = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self._state is not None:
            self._state.note_trainable(
                pl_module
            )  # layers that are unfrozen in this epoch and frozen again before a checkpoint

    def on_train_chunk_end(self, trainer: Trainer, pl_module: LightningModule, chunk: int) -> None:
        """Save after this optimizer step; :class:`~lit_lora.datamodules.DataProgress` calls this at the end of a chunk."""
        self._is_due |= self.save_on_chunk_end

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        self._stop_at_step(trainer)
        if self._is_due and not accumulating(trainer):
            self._is_due = False
            if not self._should_skip_saving_checkpoint(trainer):
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_at_step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with within_epoch(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if accumulating(trainer) and self._should_save_on_exception(trainer):
            rank_zero_warn(
                "the checkpoint does not hold the gradients that the unfinished optimizer step had accumulated"
            )
        try:
            super().on_exception(trainer, pl_module, exception)
        except UserError as error:  # the exception that ended the run is the one to show
            rank_zero_warn(str(error))
        finally:
            if self._lock is not None:  # Lightning tears no callback down after an exception
                self._lock.release()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training, which ModelCheckpoint does only if it has saved nothing before."""
        if self._should_skip_saving_checkpoint(trainer) or trainer.global_step == self._first_step:
            return
        with within_epoch(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.save_last:
                self._write_last(trainer, candidates)
            elif self.monitor is None:
                self._save_topk_checkpoint(trainer, candidates)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the last save of a run that was killed at its end, since nothing is left to train and so nothing is saved."""
        super().on_fit_end(trainer, pl_module)
        resumed = str(trainer.ckpt_path)
        if (
            self._trains
            or resumed not in self._found
            or getattr(trainer, "fast_dev_run", False)
            or not self._is_inside(resumed)
        ):
            return
        self._finish_last_save(trainer, resumed)
        if self.save_last and trainer.is_global_zero:
            self._update_last(trainer, os.path.realpath(resumed))

    def _update_last(self, trainer: Trainer, saved: str) -> None:
        """Make ``last`` what it would have become after this checkpoint was saved."""
        last = self.last_model_path
        if not last:
            last = self.format_checkpoint_name(self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST)
            if os.path.lexists(last):
                return  # of another run
        if os.path.realpath(last) == saved or _modified(last) >= _modified(saved):
            return
        if self.save_last == "link":
            _link_with_folders(saved, last)
        else:
            _copy_with_folders(saved, last)
        self.last_model_path = last

    def save_now(self, trainer: Trainer) -> str:
        """Save a complete ``last`` checkpoint, whatever the options say, and return its path; a collective call.

        Raises:
            UserError: If the trained weights or the optimizer's state are not finite.
        """
        options = self.save_last, self.save_weights_only
        self.save_last, self.save_weights_only = True, False
        try:
            self._step_of_last = None
            self._write_last(trainer, self._monitor_candidates(trainer))
        finally:
            self.save_last, self.save_weights_only = options
        return self.last_model_path

    def _stop_at_step(self, trainer: Trainer) -> None:
        """Put off the end of training to the next optimizer step: accumulated gradients, and so their samples, would be lost."""
        if accumulating(trainer):
            self._stop_is_due |= trainer.should_stop
            trainer.should_stop = False
        elif self._stop_is_due:
            trainer.should_stop = True

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._must_wait(trainer):
            return
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        # ModelCheckpoint leaves ``last`` as it is when this checkpoint is not among the best.
        self._write_last(trainer, monitor_candidates)

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
        if not replaced or os.path.realpath(replaced) == saved or _modified(replaced) > _modified(saved):
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

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # ModelCheckpoint calls this after its triggers, and after each validation if save_last is "link".
        if self._last_global_step_saved == trainer.global_step:
            self._write_last(trainer, monitor_candidates)

    def _write_last(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._step_of_last == trainer.global_step or not self.save_last or self._must_wait(trainer):
            return
        option = self.save_last
        if self._last_global_step_saved != trainer.global_step:
            self.save_last = True  # no checkpoint of this step to link to
        try:
            super()._save_last_checkpoint(trainer, monitor_candidates)
        finally:
            self.save_last = option
        self._step_of_last = trainer.global_step

    def _must_wait(self, trainer: Trainer) -> bool:
        """Whether nothing may be saved now; what is due waits for the next optimizer step that is not skipped."""
        if accumulating(trainer):
            self._is_due = True
            return True
        if guard := FiniteGradients.of(trainer):
            guard.read(trainer, trainer.lightning_module)
            if guard.streak:
                self._is_due = True
                return True
        return False

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Candidates for ``ckpt_path="last"``; without a ``dirpath`` also those in the log folders of earlier runs.

        Loggers give every run a new ``version_N`` folder, so ModelCheckpoint would find nothing there and start over. The newest
        of all counts, since a killed run may not have written its ``last`` yet.
        """
        found: set[str] = super()._find_last_checkpoints(trainer)
        pattern = "*.ckpt" if self.save_last else f"{self.CHECKPOINT_NAME_LAST}*.ckpt"
        if found:
            folders = {Path(name).parent for name in found}
            pattern = "*.ckpt"
        elif self.dirpath is not None:
            folders = set() if "://" in str(self.dirpath) else {Path(self.dirpath)}
        else:
            folders = (
                set() if trainer.log_dir is None else set(Path(trainer.log_dir).parent.glob("version_*/checkpoints"))
            )
        self._found = found | {str(path) for folder in folders for path in folder.glob(pattern) if path.exists()}
        _warn_of_future(self._found)
        return self._found

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # As in ModelCheckpoint, except that the file is renamed into place once it is complete and synced.
        _check_finite(trainer)
        part = f"{filepath}.part"
        try:
            trainer.save_checkpoint(part, self.save_weights_only)
            if trainer.is_global_zero or shards_weights(trainer.strategy):
                self._save_adapter_folders(trainer, filepath)
        except OSError as error:
            if trainer.is_global_zero:
                _discard(Path(part))  # it may be what fills the disk
            if error.filename is None or str(error.filename).startswith(part):
                error.filename = filepath
            raise
        if trainer.is_global_zero and os.path.exists(part):  # remote file systems write atomically by themselves
            sync(Path(part))
            os.replace(part, filepath)
            sync(Path(filepath).parent)
        trainer.strategy.barrier()
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _save_adapter_folders(self, trainer: Trainer, filepath: str) -> None:
        module: Any = trainer.lightning_module
        if not hasattr(module, "save_adapter"):
            return
        plain, averaged = _adapter_folders(filepath)
        for folder in (plain, averaged):
            if trainer.is_global_zero and folder.is_symlink():
                folder.unlink()  # ``last`` was a link and becomes a checkpoint of its own
        module.save_adapter(plain)
        if ema := AdapterEMA.of(trainer):
            with ema.averaged(module):
                module.save_adapter(averaged)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        last = self.last_model_path
        if trainer.is_global_zero and os.path.islink(last) and os.path.realpath(last) == os.path.realpath(filepath):
            # ModelCheckpoint removes the old checkpoint before it moves the link; a run killed in between could not be resumed.
            _link_with_folders(self._last_checkpoint_saved, last)
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            for folder in _adapter_folders(filepath):
                if folder.is_symlink():
                    folder.unlink()
                else:
                    shutil.rmtree(folder, ignore_errors=True)

    def _keep_training_state(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        if self._filters:
            keys = adapter_keys(module) if self._state is None else self._state.look(module)
            keep_only_adapter(state_dict, {prefix + key for key in keys})

    def _check_loaded(self, module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        self._state = self._state or TrainingState(module)
        self._filters = False
        try:
            check_adapter_state(module, state_dict)
        finally:
            self._filters = True
        self._state.restored(set(state_dict))

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            _link_with_folders(filepath, linkpath)
        trainer.strategy.barrier()


def _check_finite(trainer: Trainer) -> None:
    """Refuse to write weights or optimizer states that are not finite, in all processes alike; a collective call.

    Raises:
        UserError: If a value is NaN or Inf.
    """
    trained = ((name, p) for name, p in trainer.lightning_module.named_parameters() if p.requires_grad)
    named = {name: getattr(parameter, "ds_tensor", parameter) for name, parameter in trained}  # DeepSpeed's own shard
    states = tensors_in([list(optimizer.state.values()) for optimizer in trainer.optimizers])
    found = [name for names in gather(non_finite_names(named) or non_finite_names(states)) for name in names]
    if found:
        raise UserError(
            f"nothing is saved at step {trainer.global_step}: {len(found)} tensors of weights or optimizer state hold NaN or "
            f"Inf, the first is {found[0]}. Resume from an earlier checkpoint with a lower lr or trainer.gradient_clip_val: 1.0"
        )


def _warn_of_future(found: set[str]) -> None:
    """The newest checkpoint is known by its time, which tells nothing once the clock has been set back."""
    later = sorted(
        name for name in found if "://" not in name and os.stat(name).st_mtime > time.time() + _CLOCKS_DIFFER_S
    )
    if later:
        rank_zero_warn(
            f"{later[0]} was saved in the future by this machine's clock, so that ckpt_path=last may not be the newest of "
            f"{len(found)} checkpoints; name the right one, or set its time with touch"
        )


def _tidy(folder: Path) -> None:
    """Remove or finish what a killed run has left unfinished."""
    restore_replaced(folder, "*.adapter")
    for pattern in ("*.ckpt*.part", "*.adapter*.part"):
        for unfinished in folder.glob(pattern):
            _discard(unfinished)


def _modified(name: str) -> float:
    """Time of the last change of a checkpoint; 0 if it is gone, so that at most its folders are left."""
    try:
        return os.stat(name).st_mtime
    except OSError:
        return 0.0


def _discard(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _adapter_folders(filepath: str) -> tuple[Path, Path]:
    """The folders beside a checkpoint: the adapter, and its average."""
    stem = filepath.removesuffix(ModelCheckpoint.FILE_EXTENSION)
    return Path(f"{stem}.adapter"), Path(f"{stem}.ema.adapter")


def _link_with_folders(filepath: str, linkpath: str) -> None:
    link(Path(filepath), Path(linkpath))
    for folder, folder_link in zip(_adapter_folders(filepath), _adapter_folders(linkpath), strict=True):
        if folder.exists():
            link(folder, folder_link)


def _copy_with_folders(filepath: str, copy: str) -> None:
    """Replace a checkpoint and its folders by copies; the checkpoint comes last, as where it is saved."""
    for folder, folder_copy in zip(_adapter_folders(filepath), _adapter_folders(copy), strict=True):
        if folder.exists():
            part = folder_copy.with_name(folder_copy.name + ".part")
            _discard(part)
            shutil.copytree(folder, part)
            _discard(folder_copy)
            part.rename(folder_copy)
    with atomic_file(copy) as part:
        shutil.copyfile(filepath, part)


def _adapter_configs(module: LightningModule) -> dict[str, dict[str, Any]]:
    return {
        f"{path}.{name}": plain_config(config)
        for path, child in module.named_modules()
        if isinstance(child, PeftModel)
        for name, config in child.peft_config.items()
    }
