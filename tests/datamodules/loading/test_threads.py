from __future__ import annotations

import threading
import time

import pytest
import torch

from lit_lora.datamodules.loading.threads import LoaderThreads


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order(count):
    def slow_at_first(item):
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    threads = LoaderThreads(slow_at_first, count)
    for _ in range(2):
        assert list(threads.run(range(20))) == [item * item for item in range(20)]
    threads.close()


def test_only_a_few_items_are_taken_ahead():
    taken = []
    threads = LoaderThreads(lambda item: item, 2)
    results = threads.run(taken.append(item) or item for item in range(100))
    assert next(results) == 0
    assert len(taken) == 4
    results.close()
    assert len(taken) == 4
    threads.close()


def test_work_is_shared():
    together = threading.Barrier(3, timeout=10)
    threads = LoaderThreads(lambda _: together.wait(), 3)
    assert sorted(threads.run(range(3))) == [0, 1, 2]
    threads.close()


def test_error_is_raised_when_its_result_is_due():
    def fail_at_three(item):
        if item == 3:
            raise KeyError("three")
        return item

    threads = LoaderThreads(fail_at_three, 2)
    results = threads.run(range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)
    assert list(threads.run(range(3))) == [0, 1, 2]
    threads.close()


def test_each_thread_computes_alone_and_others_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = LoaderThreads(lambda _: torch.get_num_threads(), 2)
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
    threads = LoaderThreads(lambda item: item, 2)
    list(threads.run(range(3)))
    started = list(threads._threads)
    threads.close()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
