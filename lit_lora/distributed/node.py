"""The processes of one machine, of which one reads files for all of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor, distributed

from lit_lora.distributed.collectives import time_limit


class Node:
    """Reads large files in one process of each machine, which sends them to the other processes of that machine.

    Creating it is a collective call of all processes of the run.

    Args:
        processes: Number of the run's processes on this machine; defaults to 1. Ranks are counted machine by machine.
        timeout: How long the others wait for the reading process; defaults to torch's 30 minutes.
    """

    def __init__(self, processes: int = 1, timeout: timedelta | None = None) -> None:
        self._group: distributed.ProcessGroup | None = None
        self._leader = 0
        if processes > 1:
            # Always gloo, because the tensors are in host memory.
            self._group, _ = distributed.new_subgroups(processes, backend="gloo", timeout=timeout)
            self._leader = distributed.get_process_group_ranks(self._group)[0]

    @classmethod
    def of(cls, trainer: Any | None) -> Self:
        """The processes of this machine in a trainer's run; this process alone without a trainer."""
        if trainer is None or trainer.world_size == 1:
            return cls()
        return cls(trainer.num_devices, time_limit(trainer.strategy))

    @property
    def reads(self) -> bool:
        """Whether this process reads the files."""
        return self._group is None or distributed.get_rank() == self._leader

    def read(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that ``make`` returns in the reading process, on the CPU, in every process of the machine.

        A collective call of the machine's processes. An exception that ``make`` raises is raised in all of them.

        Args:
            make: Function that reads; called only in the reading process.
        """
        if self._group is None:
            return make()
        values: dict[str, Tensor] = {}
        failure: Exception | None = None
        header: list[list[tuple[str, torch.Size, torch.dtype]] | Exception | None] = [None]
        if self.reads:
            try:
                values = {name: value.detach().contiguous() for name, value in make().items()}
                header[0] = [(name, value.shape, value.dtype) for name, value in values.items()]
            except Exception as error:  # of any kind, since the other processes wait for the header
                failure, header[0] = error, _sendable(error)
        distributed.broadcast_object_list(header, self._leader, self._group)
        if failure is not None:
            raise failure
        described = header[0]
        if isinstance(described, Exception):
            raise described
        assert described is not None
        for name, shape, dtype in described:
            if not self.reads:
                values[name] = torch.empty(shape, dtype=dtype)
            # As bytes, since gloo does not know all dtypes.
            distributed.broadcast(values[name].view(-1).view(torch.uint8), self._leader, self._group)
        return values


def _sendable(error: Exception) -> Exception:
    """The error itself if it can be pickled, otherwise one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
