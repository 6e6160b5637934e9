from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import distributed

from lit_lora import told_once
from lit_lora.console import report
from lit_lora.distributed import end_on_error
from lit_lora.distributed.end_on_error import EndOnError
from lit_lora.errors import UserError


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> distributed.Store:
    store = distributed.HashStore()
    monkeypatch.setattr(end_on_error, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(end_on_error.faulthandler, "dump_traceback_later", lambda *_args, **_options: None)
    return store


def fail(rank: int, error: Exception, node: int = 0) -> int:
    trainer: Any = SimpleNamespace(world_size=2, global_rank=rank, local_rank=rank, node_rank=node)
    EndOnError().on_exception(trainer, trainer, error)
    return report(error)


def test_a_mistake_of_all_processes_is_printed_once_and_others_with_their_process(
    store: distributed.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor() as pool:
        later = pool.submit(fail, 1, UserError("too small"))
        assert fail(0, UserError("too small")) == later.result() == 2
    assert capsys.readouterr().err == "lit-lora: error in process 0 of 2\ntoo small\n"
    fail(0, UserError("too small"), node=1)  # whose console may be another one
    assert capsys.readouterr().err == "lit-lora: error in process 0 of 2\ntoo small\n"
    fail(0, UserError("bad sample"))
    assert capsys.readouterr().err == "lit-lora: error in process 0 of 2\nbad sample\n"


def test_a_mistake_of_one_process_is_printed_without_the_first(
    store: distributed.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(told_once, "SECONDS_OF_FIRST", 0.01)
    trainer: Any = SimpleNamespace(world_size=2, global_rank=1, local_rank=1, node_rank=0)
    end = EndOnError(lambda message: f"{message}; use another")
    end.on_exception(trainer, trainer, MisconfigurationException("no such device"))
    assert capsys.readouterr().err == "lit-lora: error in process 1 of 2\nno such device; use another\n"


def test_a_mistake_is_printed_if_the_process_that_was_to_print_it_has_ended(
    store: distributed.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(told_once, "SECONDS_TO_ASK", 0.01)
    store.add("lit_lora of node 0: too small begun", 1)
    fail(1, UserError("too small"))
    assert capsys.readouterr().err == "lit-lora: error in process 1 of 2\ntoo small\n"


def test_a_mistake_is_printed_if_no_store_answers(
    store: distributed.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost() -> distributed.Store:
        raise distributed.DistNetworkError("connection reset")

    monkeypatch.setattr(end_on_error, "_get_default_store", lost)
    fail(1, UserError("too small"))
    assert capsys.readouterr().err == "lit-lora: error in process 1 of 2\ntoo small\n"


def test_the_end_of_another_process_is_printed_once(
    store: distributed.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:3501: Connection reset by peer")
    trainer: Any = SimpleNamespace(world_size=2, global_rank=0, local_rank=0, node_rank=0)
    EndOnError().on_exception(trainer, trainer, lost)
    assert report(lost) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("lit-lora: process 0 of 2 ends\nanother process of this run has ended")
    assert printed.count("Connection reset") == printed.count("another process") == 1
