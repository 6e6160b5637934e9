"""Worker threads that prefetch results in order."""

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

_AHEAD = 2  # items per thread, as DataLoader's prefetch_factor


class LoaderThreads(Generic[Item, Result]):
    """Calls a function for each item in several threads and yields the results in the order of the items.

    Threads suit reading and decoding of images better than processes: nearly all of the work releases Python's lock, and a
    batch need not be copied through shared memory, which costs a third of decoding it. They also start at once, share all
    memory, and leave nothing behind when the process is killed.

    Args:
        function: Function to call; it must be thread-safe.
        count: Number of threads.
    """

    def __init__(self, function: Callable[[Item], Result], count: int) -> None:
        self._function = function
        self._ahead = _AHEAD * count
        self._tasks: queue.SimpleQueue[tuple[Future[Result], Item] | None] = queue.SimpleQueue()
        ready = threading.Barrier(count + 1)
        # Daemon threads, since one that waits for a slow disk must not keep the program from ending.
        self._threads = [threading.Thread(target=self._work, args=(ready,), daemon=True) for _ in range(count)]
        own = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        ready.wait()
        torch.set_num_threads(own)  # the setting in the worker threads is also the default for new threads

    def run(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in order; a few items are processed ahead.

        Raises:
            Exception: If the function raised it for an item; raised when the result of that item is due.
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
        # Without this limit torch would start further threads for each large copy. The first call of get_num_threads reads the
        # default, so it must come before set_num_threads.
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()
        while (task := self._tasks.get()) is not None:
            future, item = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._function(item))
                except BaseException as error:  # raised again when the result is due
                    future.set_exception(error)
            del task, future, item  # frees the batch while the thread waits for the next item
