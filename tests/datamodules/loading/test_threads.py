from __future__ import annotations

import threading
import time

import pytest
import torch

from lit_lora.datamodules.loading.threads import LoaderThreads


class Single:
    """Work of a single part: a call of a function."""

    def __init__(self, function, item):
        self.function, self.item = function, item

    def __len__(self):
        return 1

    def do(self, part):
        self.result = self.function(self.item)

    def finish(self):
        return self.result


def _threads(function, count):
    return LoaderThreads(lambda item: Single(function, item), count)


class Together:
    """Work of three parts, each of which waits until all have begun."""

    def __init__(self, item, errors=()):
        self.item, self.errors, self.done = item, errors, []
        self.barrier = threading.Barrier(3, timeout=120)

    def __len__(self):
        return 3

    def do(self, part):
        self.barrier.wait()
        if part in self.errors:
            time.sleep(0.02 if part == min(self.errors) else 0)
            raise KeyError(part)
        self.done.append(part)

    def finish(self):
        return self.item, sorted(self.done)


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order(count):
    def slow_at_first(item):
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    threads = _threads(slow_at_first, count)
    for _ in range(2):
        assert list(threads.run(range(20))) == [item * item for item in range(20)]
    threads.close()


def test_only_a_few_items_are_taken_ahead():
    taken = []
    threads = _threads(lambda item: item, 2)
    results = threads.run(taken.append(item) or item for item in range(100))
    assert next(results) == 0
    assert len(taken) == 4
    results.close()
    assert len(taken) == 4
    threads.close()


def test_work_is_shared():
    together = threading.Barrier(3, timeout=120)
    threads = _threads(lambda _: together.wait(), 3)
    assert sorted(threads.run(range(3))) == [0, 1, 2]
    threads.close()


def test_error_is_raised_when_its_result_is_due():
    def fail_at_three(item):
        if item == 3:
            raise KeyError("three")
        return item

    threads = _threads(fail_at_three, 2)
    results = threads.run(range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)
    assert list(threads.run(range(3))) == [0, 1, 2]
    threads.close()


def test_parts_of_one_item_are_shared():
    threads = LoaderThreads(Together, 3)
    assert list(threads.run("ab")) == [("a", [0, 1, 2]), ("b", [0, 1, 2])]
    threads.close()


def test_error_is_that_of_the_first_part():
    threads = LoaderThreads(lambda item: Together(item, errors=(1, 2)), 3)
    with pytest.raises(KeyError, match="1"):
        next(threads.run("a"))
    threads.close()


def test_error_while_finishing():
    work = Single(None, None)
    work.do = lambda part: None
    threads = LoaderThreads(lambda item: work, 2)
    with pytest.raises(AttributeError, match="result"):
        next(threads.run("a"))
    threads.close()


def test_abandoned_items_are_not_loaded():
    loaded, go = [], threading.Event()
    threads = _threads(lambda item: go.wait(120) and loaded.append(item), 1)
    results = threads.run(range(10))
    go.set()
    next(results)
    go.clear()
    results.close()
    go.set()
    assert list(threads.run([10])) == [None]
    assert loaded[0] == 0
    assert loaded[-1] == 10
    assert len(loaded) <= 3
    threads.close()


def test_each_thread_computes_alone_and_others_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = _threads(lambda _: torch.get_num_threads(), 2)
        assert list(threads.run(range(4))) == [1] * 4
        assert torch.get_num_threads() == 2
        found = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert found == [2]
        threads.close()
    finally:
        torch.set_num_threads(before)


def test_threads_end():
    threads = _threads(lambda item: item, 2)
    list(threads.run(range(3)))
    started = list(threads._threads)
    threads.close()
    for thread in started:
        thread.join(120)
        assert not thread.is_alive()
