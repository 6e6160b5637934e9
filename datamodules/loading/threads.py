"""Worker threads that prefetch results in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

_AHEAD = 2  # items per thread, as DataLoader's prefetch_factor


class SharedWork(Protocol[Result_co]):
    """Work on one item in several parts, which threads may do at the same time."""

    def __len__(self) -> int:
        """Number of parts, at least 1."""

    def do(self, part: int) -> None:
        """Do one part; parts are begun in their order."""

    def finish(self) -> Result_co:
        """The result, after all parts."""


class LoaderThreads(Generic[Item, Result]):
    """Works on items in several threads and yields the results in the order of the items.

    Threads suit reading and decoding of images better than processes: nearly all of the work releases Python's lock, and a
    batch need not be copied through shared memory, which costs a third of decoding it. They also start at once, share all
    memory, and leave nothing behind when the process is killed.

    The threads share the parts of an item, so that all of them are busy up to the last part of the last item.

    Args:
        begin: Function from an item to the work on it.
        count: Number of threads.
    """

    def __init__(self, begin: Callable[[Item], SharedWork[Result]], count: int) -> None:
        self._begin = begin
        self._ahead = _AHEAD * count
        self._tasks: queue.SimpleQueue[_Pending[Result] | None] = queue.SimpleQueue()
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
            Exception: If the work on an item raised it, in the first part that did; raised when the result of that item is due.
        """
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                one = _Pending(self._begin(item))
                pending.append(one.future)
                for _ in range(one.parts):
                    self._tasks.put(one)
                del one  # so that its result is freed with the future
                if len(pending) >= self._ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the threads after the parts that they were given."""
        for _ in self._threads:
            self._tasks.put(None)
        self._threads = []

    def _work(self, ready: threading.Barrier) -> None:
        # Without this limit torch would start further threads for each large copy. The first call of get_num_threads reads the
        # default, so it must come before set_num_threads.
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()
        while (pending := self._tasks.get()) is not None:
            pending.do_next()
            del pending  # frees the batch while the thread waits for the next part


class _Pending(Generic[Result]):
    """Work whose parts are done one by one; the future stays pending, and can be cancelled, until all are done."""

    def __init__(self, work: SharedWork[Result]) -> None:
        self.future: Future[Result] = Future()
        self.parts = len(work)
        self._work = work
        self._begun = self._done = 0
        self._errors: dict[int, BaseException] = {}
        self._lock = threading.Lock()

    def do_next(self) -> None:
        """Do the next part, and finish after the last; after an error or cancelling, parts are passed over."""
        with self._lock:
            part = self._begun
            self._begun += 1
        if not self._errors and not self.future.cancelled():
            try:
                self._work.do(part)
            except BaseException as error:  # raised again when the result is due
                self._errors[part] = error
        with self._lock:
            self._done += 1
            last = self._done == self.parts
        if last and self.future.set_running_or_notify_cancel():
            self._finish()

    def _finish(self) -> None:
        if self._errors:
            self.future.set_exception(self._errors[min(self._errors)])
            return
        try:
            self.future.set_result(self._work.finish())
        except BaseException as error:
            self.future.set_exception(error)
