"""The processes of one machine, of which one reads files for all of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, distributed

from lit_lora import mapped
from lit_lora.distributed.collectives import time_limit
from lit_lora.errors import UserError
from lit_lora.files import writable_folder

T = TypeVar("T")

_BUNDLE_BYTES = 2**24
"""Tensors are sent together up to this size: each call takes as long as a context switch, which small tensors are not worth."""


def bundles(items: Iterable[T], size_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Yield successive items in lists of at most a total size; a larger item is alone.

    Args:
        items: The items.
        size_of: Function that returns the size of an item.
        most: The largest size of a list.
    """
    bundle: list[T] = []
    size = 0
    for item in items:
        if bundle and size + size_of(item) > most:
            yield bundle
            bundle, size = [], 0
        bundle.append(item)
        size += size_of(item)
    if bundle:
        yield bundle


class Node:
    """Reads large files in one process of each machine, which sends them to the other processes of that machine.

    Creating it is a collective call of all processes of the run.

    Args:
        processes: Number of the run's processes on this machine; defaults to 1. Ranks are counted machine by machine.
        timeout: How long the others wait for the reading process; defaults to torch's 30 minutes.
        folder: Folder of this machine for temporary files, from which all its processes map tensors that may stay on disk;
            defaults to none.

    Raises:
        UserError: If the folder cannot be created or written.
    """

    def __init__(self, processes: int = 1, timeout: timedelta | None = None, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            writable_folder(self._folder)
        self._group: distributed.ProcessGroup | None = None
        self._leader = 0
        if processes > 1:
            # Always gloo, because the tensors are in host memory.
            self._group, _ = distributed.new_subgroups(processes, backend="gloo", timeout=timeout)
            self._leader = distributed.get_process_group_ranks(self._group)[0]

    @classmethod
    def of(cls, trainer: Any | None, folder: str | Path | None = None) -> Self:
        """The processes of this machine in a trainer's run; this process alone without a trainer.

        Args:
            trainer: The trainer.
            folder: See the class.
        """
        if trainer is None or trainer.world_size == 1:
            return cls(folder=folder)
        return cls(trainer.num_devices, time_limit(trainer.strategy), folder)

    @property
    def reads(self) -> bool:
        """Whether this process reads the files."""
        return self._group is None or distributed.get_rank() == self._leader

    def read(self, make: Callable[[], dict[str, Tensor]], may_be_mapped: bool = False) -> dict[str, Tensor]:
        """The tensors that ``make`` returns in the reading process, on the CPU, in every process of the machine.

        A collective call of the machine's processes. An exception that is raised in the reading process is raised in all of
        them.

        Args:
            make: Function that reads; called only in the reading process.
            may_be_mapped: Whether large tensors are mapped from the folder for temporary files, if there is one; defaults to
                False.

        Raises:
            OSError: If the disk is full.
            UserError: If the folder's file system cannot map files.
        """
        folder = self._folder if may_be_mapped else None
        if self._group is None and folder is None:
            return make()
        values: dict[str, Tensor] = {}
        failure: Exception | None = None
        header: list[list[_Described] | Exception | None] = [None]
        with ExitStack() as files:
            if self.reads:
                try:
                    values = {name: value.detach().contiguous() for name, value in make().items()}
                    header[0] = [_described(name, value, folder, files) for name, value in values.items()]
                except Exception as error:  # of any kind, since the other processes wait for the header
                    failure, header[0] = error, _sendable(error)
            if self._group is not None:
                distributed.broadcast_object_list(header, self._leader, self._group)
            if failure is not None:
                raise failure
            described = header[0]
            if isinstance(described, Exception):
                raise described
            assert described is not None
            for one in described:
                if one.file is not None:
                    values[one.name] = mapped.map_file(one.file, one.shape, one.dtype)
                elif not self.reads:
                    values[one.name] = torch.empty(one.shape, dtype=one.dtype)
            if self._group is not None:
                self._send([values[one.name] for one in described if one.file is None])
                if any(one.file for one in described):
                    distributed.barrier(self._group)  # the files lose their names now
        return values

    def _send(self, tensors: Sequence[Tensor]) -> None:
        """Fill the tensors with the values that they have in the reading process."""
        # As bytes, since gloo does not know all dtypes.
        flat = [tensor.view(-1).view(torch.uint8) for tensor in tensors]
        for bundle in bundles(flat, lambda tensor: tensor.nbytes, _BUNDLE_BYTES):
            joined = bundle[0] if len(bundle) == 1 else torch.cat(bundle)
            distributed.broadcast(joined, self._leader, self._group)
            if not self.reads and len(bundle) > 1:
                for tensor, sent in zip(bundle, joined.split([tensor.nbytes for tensor in bundle]), strict=True):
                    tensor.copy_(sent)


class _Described(NamedTuple):
    """A tensor that the processes of a machine share."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    file: Path | None
    """File with its values, which all of them map; None if they are sent."""


def _described(name: str, value: Tensor, folder: Path | None, files: ExitStack) -> _Described:
    """Describe a tensor, and write it to a file if it is large and there is a folder."""
    if folder is None or value.nbytes <= mapped.SMALL:
        return _Described(name, value.shape, value.dtype, None)
    file = files.enter_context(mapped.file_of(value, folder))
    try:
        mapped.map_file(file, value.shape, value.dtype)
    except RuntimeError as error:
        raise UserError(
            f"{folder} is on a file system that cannot map files ({str(error).splitlines()[0]}); name a folder on a local disk"
        ) from error
    return _Described(name, value.shape, value.dtype, file)


def _sendable(error: Exception) -> Exception:
    """The error itself if it can be pickled, otherwise one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
