"""Files of a checkpoint: ``NAME.ckpt`` with the folders ``NAME.adapter`` and ``NAME.ema.adapter``; options to write it with."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.errors import UserError
from lit_lora.files import atomic_file, link, restore_replaced, sync
from lit_lora.folder_lock import FolderLock

_CLOCKS_DIFFER_S = 300.0


def warn_of_future(found: set[str]) -> None:
    """The newest checkpoint is known by its time, which tells nothing once the clock has been set back."""
    later = sorted(
        name for name in found if "://" not in name and os.stat(name).st_mtime > time.time() + _CLOCKS_DIFFER_S
    )
    if later:
        rank_zero_warn(
            f"{later[0]} was saved in the future by this machine's clock, so that ckpt_path=last may not be the newest of "
            f"{len(found)} checkpoints; name the right one, or set its time with touch"
        )


def check_given(owner: Any, given: dict[str, Any]) -> None:
    """Refuse options of the adapter's files that what writes them does not take.

    Args:
        owner: Object with ``save_adapter``; None if no files are written.
        given: Options of ``save_adapter``, without those that are not set.

    Raises:
        UserError: If it takes one of them not.
    """
    known = {} if owner is None else signature(owner.save_adapter).parameters
    if others := [name for name in given if name not in known]:
        writer = (
            "no adapter's files are written" if owner is None else f"{type(owner).__name__} writes PEFT's files alone"
        )
        raise UserError(f"{others[0]} of AdapterCheckpoint has no effect here: {writer}; leave it out")


def kept_nothing(callback: ModelCheckpoint) -> bool:
    """Whether a callback for the best checkpoints has kept none at the end, since nothing was measured; warns if so."""
    # After a resume in another folder Lightning knows the best checkpoint, but not the others.
    kept = bool(callback.best_k_models or callback.best_model_path)
    if callback.monitor is None or callback.save_top_k == 0 or kept:
        return False
    rank_zero_warn(
        f"{callback.monitor} was never logged, so that no checkpoint was kept as the best: the end of training is saved as "
        f"{callback.CHECKPOINT_NAME_LAST}; validate within the run (trainer.val_check_interval, limit_val_batches), or leave out "
        "monitor"
    )
    return True


def warn_if_nothing_is_saved(callback: ModelCheckpoint) -> None:
    """Warn that a callback's options have it save nothing."""
    if callback.save_top_k == 0 and not callback.save_last:
        rank_zero_warn(
            f"{type(callback).__name__} saves nothing, since save_top_k is 0 and save_last is not set: what is trained would be "
            "lost; set one of them, or leave the callback out"
        )


def warn_of_one_chunk(trainer: Trainer) -> None:
    """Warn that no chunk of the training data ends, if they are known to have only one."""
    plan = getattr(trainer.train_dataloader, "plan", None)
    if getattr(plan, "num_chunks", 2) < 2:
        rank_zero_warn(
            "save_on_chunk_end of AdapterCheckpoint saves nothing, since the training data are one chunk; set chunks of the "
            "datamodule, or every_n_train_steps"
        )


def claim(folder: Path) -> FolderLock:
    """Take a folder for a run's checkpoints, and remove what a killed run has left there; warns if another run has it."""
    lock = FolderLock(folder)
    if other := lock.take():
        rank_zero_warn(
            f"{other} saves its checkpoints in {folder} too, and one run may replace or resume from those of the other; end one "
            f"of them, or give each its own dirpath"
        )
    else:
        tidy(folder)
    return lock


def tidy(folder: Path) -> None:
    """Remove or finish what a killed run has left unfinished."""
    restore_replaced(folder, "*.adapter")
    for pattern in ("*.ckpt*.part", "*.adapter*.part"):
        for unfinished in folder.glob(pattern):
            discard(unfinished)


@contextmanager
def options(callback: ModelCheckpoint, **values: Any) -> Iterator[None]:
    """Give a callback other options for a while."""
    before = {name: getattr(callback, name) for name in values}
    vars(callback).update(values)
    try:
        yield
    finally:
        vars(callback).update(before)


def put_in_place(part: str, filepath: str) -> None:
    """Give a complete checkpoint its name; remote file systems, which write atomically by themselves, have no part."""
    if os.path.exists(part):
        sync(Path(part))
        os.replace(part, filepath)
        sync(Path(filepath).parent)


def modified(name: str) -> float:
    """Time of the last change of a checkpoint; 0 if it is gone, so that at most its folders are left."""
    try:
        return os.stat(name).st_mtime
    except OSError:
        return 0.0


def discard(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def adapter_folders(filepath: str) -> tuple[Path, Path]:
    """The folders beside a checkpoint: the adapter, and its average."""
    stem = filepath.removesuffix(ModelCheckpoint.FILE_EXTENSION)
    return Path(f"{stem}.adapter"), Path(f"{stem}.ema.adapter")


def own_folders(filepath: str, is_first: bool) -> tuple[Path, Path]:
    """The folders beside a checkpoint; the first process removes links: ``last`` was one and becomes a checkpoint of its own."""
    folders = adapter_folders(filepath)
    for folder in folders:
        if is_first and folder.is_symlink():
            folder.unlink()
    return folders


def link_with_folders(filepath: str, linkpath: str) -> None:
    """Point a link and its folders at a checkpoint and its folders."""
    link(Path(filepath), Path(linkpath))
    for folder, folder_link in zip(adapter_folders(filepath), adapter_folders(linkpath), strict=True):
        if folder.exists():
            link(folder, folder_link)
        else:
            discard(folder_link)  # of an earlier checkpoint, such as the average of a run that had one


def copy_with_folders(filepath: str, copy: str) -> None:
    """Replace a checkpoint and its folders by copies; the checkpoint comes last, as where it is saved."""
    for folder, folder_copy in zip(adapter_folders(filepath), adapter_folders(copy), strict=True):
        if folder.exists():
            part = folder_copy.with_name(folder_copy.name + ".part")
            discard(part)
            shutil.copytree(folder, part)
            discard(folder_copy)
            part.rename(folder_copy)
        else:
            discard(folder_copy)
    with atomic_file(copy) as part:
        shutil.copyfile(filepath, part)
