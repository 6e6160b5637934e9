"""The processes of one machine, one of which reads files for all of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import torch
from torch import Tensor, distributed


class Node:
    """Has what is large read by one process of each machine, which sends it to the others there.

    Args:
        processes: How many processes of the run this machine has; ranks are counted machine by machine. All processes of
            the run have to make their :class:`Node` at the same time.
    """

    def __init__(self, processes: int = 1) -> None:
        self._group: distributed.ProcessGroup | None = None
        self._leader = 0
        if processes > 1:
            # Over the CPU whatever the run's own group is: what is read is in host memory.
            self._group, _ = distributed.new_subgroups(processes, backend="gloo")
            self._leader = distributed.get_process_group_ranks(self._group)[0]

    @property
    def reads(self) -> bool:
        """Whether this is the process that reads."""
        return self._group is None or distributed.get_rank() == self._leader

    def read(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives in the process that reads, on the CPU, in all processes; what it raises, all raise.

        Args:
            make: Called in that process only. All processes of the node have to come here.
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
            except Exception as error:  # all of them: the other processes wait
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
    """The error as it is, if it can be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
