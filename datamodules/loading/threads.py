"""Threads that work ahead and deliver in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # for each thread, as DataLoader has it


class LoaderThreads(Generic[Item, Result]):
    """Calls a function with items in several threads and yields the results in the order of the items.

    For reading and decoding images threads are better than processes: nearly all of it happens outside Python's lock, and
    a batch need not be handed over through shared memory, which costs a third of what decoding it does. They also
    start at once, share all memory, and leave nothing behind when the process is killed.

    Args:
        function: What is called.
        count: The number of threads.
    """

    def __init__(self, function: Callable[[Item], Result], count: int) -> None:
        self._function = function
        self._ahead = _AHEAD * count
        self._tasks: queue.SimpleQueue[tuple[Future[Result], Item] | None] = queue.SimpleQueue()
        ready = threading.Barrier(count + 1)
        # Daemons: one that waits for a slow disk must not keep the program from ending.
        self._threads = [threading.Thread(target=self._work, args=(ready,), daemon=True) for _ in range(count)]
        own = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        ready.wait()
        torch.set_num_threads(own)  # what the threads chose for themselves is also the default of new threads

    def run(self, items: Iterable[Item]) -> Iterator[Result]:
        """The results, in order; a few items are taken ahead of them.

        Raises:
            Exception: Whatever the function raised, when its result is due.
        """
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                future: Future[Result] = Future()
                self._tasks.put((future, item))
                pending.append(future)
                if len(pending) >= self._ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the threads after their current item."""
        for _ in self._threads:
            self._tasks.put(None)
        self._threads = []

    def _work(self, ready: threading.Barrier) -> None:
        # Each thread is one worker. Torch would start as many again for each large copy. It looks up the default at the
        # first question, which must not come after the answer.
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()
        while (task := self._tasks.get()) is not None:
            future, item = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._function(item))
                except BaseException as error:  # raised again where the result is due
                    future.set_exception(error)
            del task, future, item  # nothing of a batch stays here while the thread waits for the next
