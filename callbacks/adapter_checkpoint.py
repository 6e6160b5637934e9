"""Checkpoints that hold only the adapter, with the adapter's files beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_lora.adapters import (
    TrainingState,
    adapter_configs,
    adapter_keys,
    check_adapter_state,
    check_finite,
    check_saved_configs,
    keep_only_adapter,
    unfreeze,
)
from lit_lora.argument_types import check_types
from lit_lora.callbacks.adapter_ema import AdapterEMA
from lit_lora.callbacks.checkpoint_files import (
    adapter_folders,
    check_given,
    claim,
    discard,
    kept_nothing,
    link_with_folders,
    options,
    own_folders,
    put_in_place,
    warn_of_one_chunk,
)
from lit_lora.callbacks.finite_gradients import FiniteGradients, check_trained
from lit_lora.callbacks.lora_injection import adapter_writer
from lit_lora.callbacks.resumed_saves import ResumedSaves
from lit_lora.callbacks.run_record import Record, of_results, run_record, saved_record, warn_of_changes
from lit_lora.callbacks.sample_images import SampleImages
from lit_lora.callbacks.schedule_free import learned_weights
from lit_lora.distributed import shards_weights
from lit_lora.distributed.collectives import gather
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.files import writable_folder
from lit_lora.finite import tensors_in
from lit_lora.folder_lock import FolderLock
from lit_lora.formats import format_named
from lit_lora.formats.info import AdapterInfo
from lit_lora.formats.known_base import base_metadata
from lit_lora.formats.of_family import check_formats
from lit_lora.loops import accumulating, begin_pass, more_is_due, resume_epoch, within_epoch
from lit_lora.optimizer_settings import ResumedOptimizers, optimizer_names, schedule_names
from lit_lora.random_state import random_state, set_random_state


class AdapterCheckpoint(ResumedSaves):
    """A :class:`~lightning.pytorch.callbacks.ModelCheckpoint` with all its options that saves only the adapter.

    A checkpoint holds the weights of the adapter, everything else that training changes, such as running statistics of BatchNorm
    (:class:`~lit_lora.adapters.training_state.TrainingState`), the state of optimizer, loops and datamodule, and the random
    number generators of every process. If the module has ``save_adapter(folder)``, as :class:`~lit_lora.LoraDiffusion` has, or
    with :class:`LoraInjection`, the folder ``NAME.adapter`` beside ``NAME.ckpt`` holds the same adapter as files, and with
    :class:`AdapterEMA` ``NAME.ema.adapter`` holds its average. Checkpoints and folders are written atomically.

    All checkpoints are taken between two optimizer steps: what is due in the middle of accumulated gradients waits for the next
    step, and so does the end of training. What is due at a step after which validation or the end of an epoch follows is saved
    after these, so that a resumed run does not miss them. Every end of training is saved, ``last`` is always the newest
    checkpoint, and weights or optimizer states that are NaN or Inf are never written.

    Resuming is exact, bit for bit on the same device and number of processes, with ``WebDatasetDataModule`` and with every
    loader that has ``state_dict`` and ``load_state_dict``. A plain ``DataLoader`` has none: Lightning starts it over, so that
    samples of the epoch are repeated.

    It works with any LightningModule that has PEFT layers or frozen parameters. Resuming with another adapter, optimizer or kind
    of schedule raises :class:`~lit_lora.UserError`; another base, quantization, objective or other setting that changes what is
    learned is a warning with both values.

    Args:
        *args: Arguments of ``ModelCheckpoint``.
        keep_optimizer_settings: Whether a resumed run goes on with the checkpoint's lr, weight decay and other settings of
            optimizer and schedule; false applies those of this run. Defaults to true, with a warning if they differ.
        formats: Names of formats to write beside PEFT's and diffusers': ``kohya``, ``comfyui`` or ``lycoris``. Defaults to none.
        info: What users should know about the adapter, such as trigger words, for metadata and model card; defaults to nothing.
        save_on_chunk_end: Also save after the optimizer step that ends a chunk of the training data; off by default.
        **kwargs: Keyword arguments of ``ModelCheckpoint``.
    """

    tells_changes = True
    """That a resumed run tells what it changes; a datamodule without such a callback tells of its batches itself."""

    def __init__(
        self,
        *args: Any,
        save_on_chunk_end: bool = False,
        keep_optimizer_settings: bool = True,
        formats: Sequence[str] = (),
        info: AdapterInfo | None = None,
        **kwargs: Any,
    ) -> None:
        check_types(AdapterCheckpoint, locals())
        super().__init__(*args, **kwargs)
        for name in formats:
            format_named(name)
        self.formats = tuple(formats)
        self.info = info
        self.keep_optimizer_settings = keep_optimizer_settings
        self.save_on_chunk_end = save_on_chunk_end
        self._is_due = False  # whether a checkpoint waits for the next optimizer step
        self._stop_is_due = False
        self._begins_pass = False  # whether the checkpoint that was loaded had completed an epoch
        self._first_step = 0
        self._step_of_last: int | None = None  # the optimizer step that ``last`` was saved at
        self._lock: FolderLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and "://" not in str(self.dirpath):
            self._lock = claim(writable_folder(str(self.dirpath)))
        pl_module.strict_loading = False
        self._saved_rng: list[dict[str, Any]] | None = None
        self._unfrozen: list[str] = []
        self._resumed: ResumedOptimizers | None = None
        self._saved_metrics: dict[str, Tensor] = {}
        self._record: Record = {}
        self._saved_record: Record = {}
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
        family = getattr(pl_module, "family", None)
        if isinstance(family, ModelFamily):
            check_formats(family, self.formats)
        check_given(adapter_writer(trainer), self._given)
        if self._resumed is not None:
            self._resumed.compare(trainer)
        self._record = run_record(trainer, pl_module)
        warn_of_changes(self._saved_record, self._record)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._lock is not None:
            self._lock.release()
        super().teardown(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["lit_lora"] = {
            "adapters": adapter_configs(pl_module),
            "rng": gather(random_state()),
            "optimizers": optimizer_names(trainer),
            "schedules": schedule_names(trainer),
            "run": self._record,
            "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            "unfrozen": [] if self._state is None else self._state.unfrozen(pl_module),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        ours = checkpoint.get("lit_lora", {})
        check_saved_configs(pl_module, ours.get("adapters", {}))
        self._saved_rng = ours.get("rng")
        self._unfrozen = ours.get("unfrozen", [])
        self._saved_metrics = ours.get("metrics", {})
        self._saved_record = saved_record(checkpoint)
        if trainer.state.fn != TrainerFn.FITTING:
            warn_of_changes(of_results(self._saved_record), run_record(trainer, pl_module))
        check_finite(tensors_in(checkpoint.get("optimizer_states", [])))
        # With optimizers there, this is the tuner, which restores what it has saved itself.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.optimizers:
            self._resumed = ResumedOptimizers(ours, checkpoint, self.keep_optimizer_settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._is_due = self._stop_is_due = False
        self._first_step, self._step_of_last = trainer.global_step, None
        if self._resumed is not None:
            self._resumed.apply(trainer)
            self._resumed = None
        # Lightning's finetuning callbacks freeze all layers at the start and restore the optimizer's parameters alone.
        unfreeze(pl_module, self._unfrozen)
        self._unfrozen = []
        connector: Any = trainer._logger_connector
        connector._callback_metrics.update(self._saved_metrics)
        self._begins_pass = resume_epoch(trainer)
        self._restore_random_state(trainer)
        if self.save_on_chunk_end:
            warn_of_one_chunk(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self._begins_pass:
            begin_pass(trainer)
            self._begins_pass = False
        if self._state is not None:
            # Layers that are unfrozen in this epoch may be frozen again before a checkpoint.
            self._state.note_trainable(pl_module)

    def on_train_chunk_end(self, trainer: Trainer, pl_module: LightningModule, chunk: int) -> None:
        """Save after this optimizer step; :class:`~lit_lora.datamodules.DataProgress` calls this at the end of a chunk."""
        self._is_due |= self.save_on_chunk_end

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step > self._first_step:  # else there is nothing to save but what the run was resumed from
            super().on_train_batch_end(trainer, *args, **kwargs)
        self._stop_at_step(trainer)
        self._save_what_is_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_at_step(trainer)
            self._save_what_is_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with within_epoch(trainer):
            super().on_train_epoch_end(trainer, pl_module)
            self._save_what_is_due(trainer)

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
            if self.save_last or kept_nothing(self):
                with options(self, save_last=self.save_last or True):
                    self._write_last(trainer, candidates)
            elif self.monitor is None:
                self._save_topk_checkpoint(trainer, candidates)

    def save_now(self, trainer: Trainer) -> str:
        """Save a complete ``last`` checkpoint, whatever the options say, and return its path; a collective call.

        Raises:
            UserError: If the trained weights or the optimizer's state are not finite.
        """
        self._step_of_last = None
        with options(self, save_last=True, save_weights_only=False):
            self._write_last(trainer, self._monitor_candidates(trainer))
        return self.last_model_path

    def training_facts(self) -> dict[str, str]:
        """What the adapter's files say about the base's contents."""
        return base_metadata(self._record.get("base", {}))

    @property
    def _given(self) -> dict[str, Any]:
        """Options of the adapter's files; a module of another project may have none."""
        return {name: value for name in ("formats", "info") if (value := getattr(self, name))}

    def _restore_random_state(self, trainer: Trainer) -> None:
        # Of other processes there is no state to continue; the run's record tells their number.
        if self._saved_rng is not None and len(self._saved_rng) == trainer.world_size:
            set_random_state(self._saved_rng[trainer.global_rank])
        self._saved_rng = None

    def _stop_at_step(self, trainer: Trainer) -> None:
        """Put off the end of training to the next optimizer step: accumulated gradients, and so their samples, would be lost."""
        if accumulating(trainer):
            self._stop_is_due |= trainer.should_stop
            trainer.should_stop = False
        elif self._stop_is_due:
            trainer.should_stop = True

    def _save_what_is_due(self, trainer: Trainer) -> None:
        if self._is_due and not accumulating(trainer):
            self._is_due = False
            if not self._should_skip_saving_checkpoint(trainer):
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._must_wait(trainer):
            return
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        # ModelCheckpoint leaves ``last`` as it is when this checkpoint is not among the best.
        self._write_last(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # ModelCheckpoint calls this after its triggers, and after each validation if save_last is "link".
        if self._last_global_step_saved == trainer.global_step:
            self._write_last(trainer, monitor_candidates)

    def _write_last(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._step_of_last == trainer.global_step or not self.save_last or self._must_wait(trainer):
            return
        can_link = self._last_global_step_saved == trainer.global_step  # to a checkpoint of this step
        with options(self, save_last=self.save_last if can_link else True):
            super()._save_last_checkpoint(trainer, monitor_candidates)
        self._step_of_last = trainer.global_step

    def _must_wait(self, trainer: Trainer) -> bool:
        """Whether nothing may be saved now; what is due waits for the next optimizer step that is not skipped, and for what
        follows the step.
        """
        if accumulating(trainer) or more_is_due(trainer):
            self._is_due = True
            return True
        if guard := FiniteGradients.of(trainer):
            guard.read(trainer, trainer.lightning_module)
            if guard.streak:
                self._is_due = True
                return True
        return False

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # As in ModelCheckpoint, except that the file is renamed into place once it is complete and synced.
        check_trained(trainer)
        part = f"{filepath}.part"
        try:
            with learned_weights(trainer):
                trainer.save_checkpoint(part, self.save_weights_only)
                if trainer.is_global_zero or shards_weights(trainer.strategy):
                    self._save_adapter_folders(trainer, filepath)
        except OSError as error:
            if trainer.is_global_zero:
                discard(Path(part))  # it may be what fills the disk
            if error.filename is None or str(error.filename).startswith(part):
                error.filename = filepath
            raise
        if trainer.is_global_zero:
            put_in_place(part, filepath)
        trainer.strategy.barrier()
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _save_adapter_folders(self, trainer: Trainer, filepath: str) -> None:
        if (owner := adapter_writer(trainer)) is None:
            return
        plain, averaged = own_folders(filepath, trainer.is_global_zero)
        owner.save_adapter(plain, **self._given)
        if ema := AdapterEMA.of(trainer):
            with ema.averaged(trainer.lightning_module):
                owner.save_adapter(averaged, **self._given)
        elif trainer.is_global_zero:
            discard(averaged)  # of an earlier run
        if samples := SampleImages.of(trainer):
            samples.show_in(averaged if ema else plain, trainer.global_step)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        last = self.last_model_path
        if trainer.is_global_zero and os.path.islink(last) and os.path.realpath(last) == os.path.realpath(filepath):
            # ModelCheckpoint removes the old checkpoint before it moves the link; a run killed in between could not be resumed.
            link_with_folders(self._last_checkpoint_saved, last)
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            for folder in adapter_folders(filepath):
                discard(folder)

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
            link_with_folders(filepath, linkpath)
        trainer.strategy.barrier()
