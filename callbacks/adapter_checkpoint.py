"""Checkpoints that hold only the adapter, with the adapter's files beside them."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any
from weakref import proxy

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch.utils.hooks import RemovableHandle

from lit_lora.adapters import adapter_keys, check_adapter_config, check_adapter_state, keep_only_adapter, plain_config
from lit_lora.callbacks.adapter_ema import AdapterEMA
from lit_lora.distributed import shards_weights
from lit_lora.distributed.collectives import gather
from lit_lora.files import sync, writable_folder


class AdapterCheckpoint(ModelCheckpoint):
    """A :class:`~lightning.pytorch.callbacks.ModelCheckpoint` with all its options that saves only the adapter.

    A checkpoint holds the weights of the adapter, the state of optimizer, loops and datamodule, and the random number generators
    of every process. If the module has ``save_adapter(folder)``, as :class:`~lit_lora.LoraDiffusion` has, the folder
    ``NAME.adapter`` beside ``NAME.ckpt`` holds the same adapter as files of PEFT and diffusers, and with :class:`AdapterEMA`
    ``NAME.ema.adapter`` holds its average. Checkpoints and folders are written atomically.

    It works with any LightningModule that has PEFT layers or frozen parameters. Resuming with another adapter raises
    :class:`~lit_lora.UserError`.

    Args:
        *args: Arguments of ``ModelCheckpoint``.
        save_on_chunk_end: Also save after the optimizer step that ends a chunk of the training data; off by default.
        **kwargs: Keyword arguments of ``ModelCheckpoint``.
    """

    def __init__(self, *args: Any, save_on_chunk_end: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.save_on_chunk_end = save_on_chunk_end
        self._chunk_has_ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and "://" not in str(self.dirpath):
            folder = writable_folder(str(self.dirpath))
            # A killed run may have left unfinished files.
            patterns = ("*.ckpt.part", "*.adapter*.part", "*.adapter.*.old")
            for unfinished in (path for pattern in patterns for path in folder.glob(pattern)):
                if unfinished.is_dir() and not unfinished.is_symlink():
                    shutil.rmtree(unfinished)
                else:
                    unfinished.unlink()
        pl_module.strict_loading = False
        self._saved_rng: list[dict[str, Any]] | None = None
        self._hooks: list[RemovableHandle] = [
            pl_module.register_state_dict_post_hook(_keep_only_adapter),
            pl_module.register_load_state_dict_pre_hook(_check_adapter_state),
        ]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        super().teardown(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["lit_lora"] = {
            "adapters": _adapter_configs(pl_module),
            "rng": gather(_rng_state()),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        ours = checkpoint.get("lit_lora", {})
        here = _adapter_configs(pl_module)
        for name, saved in ours.get("adapters", {}).items():
            check_adapter_config(here.get(name, {}), saved)
        self._saved_rng = ours.get("rng")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._saved_rng is None:
            return
        if len(self._saved_rng) == trainer.world_size:
            _set_rng_state(self._saved_rng[trainer.global_rank])
        else:
            rank_zero_warn(
                f"the checkpoint was saved by {len(self._saved_rng)} processes and this run has {trainer.world_size}, so dropout "
                f"does not continue the random numbers of that run"
            )
        self._saved_rng = None

    def on_train_chunk_end(self, trainer: Trainer, pl_module: LightningModule, chunk: int) -> None:
        """Save after this optimizer step; :class:`~lit_lora.datamodules.DataProgress` calls this at the end of a chunk."""
        self._chunk_has_ended = self.save_on_chunk_end

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        # A checkpoint between two optimizer steps would lose the accumulated gradients, and so their samples.
        if self._chunk_has_ended and not trainer.fit_loop._should_accumulate():
            self._chunk_has_ended = False
            if not self._should_skip_saving_checkpoint(trainer):
                candidates = self._monitor_candidates(trainer)
                self._save_topk_checkpoint(trainer, candidates)
                self._save_last_checkpoint(trainer, candidates)

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Candidates for ``ckpt_path="last"``; without a ``dirpath`` also those in the log folders of earlier runs.

        Loggers give every run a new ``version_N`` folder, so ModelCheckpoint would find nothing there and start over.
        """
        found: set[str] = super()._find_last_checkpoints(trainer)
        if found:  # the newest of all counts, since a resumed run may not have written a new ``last`` yet
            return found | {str(path) for name in found for path in Path(name).parent.glob("*.ckpt") if path.exists()}
        if self.dirpath is not None or trainer.log_dir is None:
            return found
        earlier = Path(trainer.log_dir).parent.glob(f"version_*/checkpoints/{self.CHECKPOINT_NAME_LAST}*.ckpt")
        return {str(path) for path in earlier if path.exists()}

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # As in ModelCheckpoint, except that the file is renamed into place once it is complete and synced.
        part = f"{filepath}.part"
        trainer.save_checkpoint(part, self.save_weights_only)
        if trainer.is_global_zero or shards_weights(trainer.strategy):
            self._save_adapter_folders(trainer, filepath)
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
        link = self.last_model_path
        if trainer.is_global_zero and os.path.islink(link) and os.path.realpath(link) == os.path.realpath(filepath):
            # ModelCheckpoint removes the old checkpoint before it moves the link; a run killed in between could not be resumed.
            _link_with_folders(self._last_checkpoint_saved, link)
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            for folder in _adapter_folders(filepath):
                if folder.is_symlink():
                    folder.unlink()
                else:
                    shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            _link_with_folders(filepath, linkpath)
        trainer.strategy.barrier()


def _keep_only_adapter(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    keep_only_adapter(state_dict, {prefix + key for key in adapter_keys(module)})


def _check_adapter_state(module: torch.nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    check_adapter_state(module, state_dict)


def _adapter_folders(filepath: str) -> tuple[Path, Path]:
    """The folders beside a checkpoint: the adapter, and its average."""
    stem = filepath.removesuffix(ModelCheckpoint.FILE_EXTENSION)
    return Path(f"{stem}.adapter"), Path(f"{stem}.ema.adapter")


def _link_with_folders(filepath: str, linkpath: str) -> None:
    _link(Path(filepath), Path(linkpath))
    for folder, link in zip(_adapter_folders(filepath), _adapter_folders(linkpath), strict=True):
        if folder.exists():
            _link(folder, link)


def _link(target: Path, link: Path) -> None:
    """Point ``link`` at ``target`` atomically."""
    part = link.with_name(link.name + ".part")
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(target, link.parent))
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    part.replace(link)


def _adapter_configs(module: LightningModule) -> dict[str, dict[str, Any]]:
    return {
        f"{path}.{name}": plain_config(config)
        for path, child in module.named_modules()
        if isinstance(child, PeftModel)
        for name, config in child.peft_config.items()
    }


def _rng_state() -> dict[str, Any]:
    """States of this process's random number generators, in types that ``torch.load(weights_only=True)`` accepts."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
