"""Reading of checkpoints without executing what is in them."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_lora.argument_types import check_types
from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.remote.transfer import fetch, is_remote, object_size
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, remedy
from lit_lora.redact import redact

_MAX_BYTES = 64 * 2**30
"""Size limit of a remote checkpoint."""

_SPAWNED = ".temp.ckpt"
"""Name of the weights, alone, that Lightning's spawned or forked processes hand back to the first one."""


def _on_cpu(storage: Any, location: str) -> Any:
    """As Lightning does: tensors of any device on the CPU."""
    return storage


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints of Lightning, always read with ``weights_only=True``: ``Trainer(plugins=[SafeCheckpointIO()])``.

    Lightning unpickles checkpoints from ``http://`` and ``https://``, which executes what is in them. Here a remote checkpoint is
    downloaded to a temporary file first. ``lit-lora`` uses this class for ``--ckpt_path``.

    Args:
        max_bytes: Size limit of remote checkpoints in bytes; defaults to 64 GiB.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        check_types(SafeCheckpointIO, locals())
        self.max_bytes = max_bytes

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint; a local one atomically and without Lightning's detour over the folder of temporary files."""
        if storage_options is not None or is_remote(os.fspath(path)):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # of torch.save itself, a full disk is a RuntimeError without a reason
        torch.save(checkpoint, buffer)
        with atomic_file(os.fspath(path)) as part:
            part.write_bytes(buffer.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Any = _on_cpu, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint; ``weights_only`` has no effect.

        Raises:
            UserError: If the file is missing, damaged or no checkpoint, contains objects that only unpickling could restore, or
                is remote and cannot be read or exceeds the limit.
        """
        if os.path.basename(path) == _SPAWNED:
            weights: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
            return weights
        if not is_remote(os.fspath(path)):
            return read_checkpoint(os.fspath(path), map_location)
        with tempfile.TemporaryDirectory(prefix="lit-lora-") as folder:
            local = Path(folder) / "remote.ckpt"
            self._download(os.fspath(path), local)
            return read_checkpoint(str(local), map_location, shown=redact(os.fspath(path)))

    def _download(self, location: str, local: Path) -> None:
        size = object_size(location)
        if size is None or size > self.max_bytes:
            stated = "of unknown size" if size is None else format_bytes(size)
            raise UserError(
                f"ckpt_path: {redact(location)} is {stated}, the limit is {format_bytes(self.max_bytes)}; download it and name "
                f"the local file"
            )
        fetch(location, local, size)


def read_checkpoint(path: str, map_location: Any, shown: str | None = None) -> dict[str, Any]:
    """Read a local checkpoint file.

    Args:
        path: Path of the file.
        map_location: As of ``torch.load``; ``"meta"`` reads no tensors.
        shown: Name of the file in errors; defaults to the path.

    Raises:
        UserError: If the file is missing, damaged or no checkpoint, or contains other objects than tensors and plain values.
    """
    shown = shown or path
    _check_kind(Path(path), shown)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=map_location == "meta" or None)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        if "Unsupported" in str(error):
            reason = "it holds objects that would have to be executed"
        raise UserError(
            f"ckpt_path: {shown} cannot be read safely: {reason}. Only tensors and plain values are read; save the checkpoint "
            f"without other objects"
        ) from error
    except PermissionError as error:
        raise UserError(f"ckpt_path: {shown} cannot be read: {error.strerror}; {remedy(error)}") from error
    except (RuntimeError, EOFError, KeyError, ValueError, AttributeError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"ckpt_path: {shown} is damaged or no checkpoint ({_first_line(error)}); name another checkpoint"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        found = type(checkpoint).__name__
        if isinstance(checkpoint, dict):
            found = f"a dict with {', '.join(map(str, list(checkpoint)[:4])) or 'no entries'}"
        raise UserError(
            f"ckpt_path: {shown} holds {found}, not a checkpoint of a training, which has a state_dict and the "
            f"trainer's progress; name a file that AdapterCheckpoint has written"
        )
    return checkpoint


def _check_kind(path: Path, shown: str) -> None:
    """Refuse what is no checkpoint file by its name or kind."""
    advice = "name the .ckpt file beside it"
    if path.is_dir():
        kind = "an adapter's folder" if (path / "adapter_config.json").exists() else "a folder"
        raise UserError(f"ckpt_path: {shown} is {kind}, not a checkpoint; {advice}")
    if path.suffix == ".safetensors":
        raise UserError(f"ckpt_path: {shown} holds weights alone, not the state of a training; {advice}")
    if path.is_symlink() and not path.exists():
        raise UserError(f"ckpt_path: {shown} points to {os.readlink(path)}, which is gone; name another checkpoint")
    if not path.is_file():
        raise UserError(f"ckpt_path: {shown} does not exist; name a .ckpt file, or last")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
