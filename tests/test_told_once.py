from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from lit_lora import told_once
from lit_lora.console import print_mistake, report
from lit_lora.errors import UserError

Environment = pytest.MonkeyPatch


@pytest.fixture
def of_torchrun(monkeypatch: Environment) -> Iterator[TCPStore]:
    """The environment of a process that torchrun started, and torchrun's store."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    names = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**names, "GROUP_RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(told_once, "SECONDS_OF_FIRST", 0.01)
    before = signal.getsignal(signal.SIGTERM)
    yield store
    signal.signal(signal.SIGTERM, before)


def test_a_mistake_of_several_processes_is_printed_once_on_each_node(
    of_torchrun: TCPStore, monkeypatch: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "lit-lora: error\ntoo small\n"
    assert report(UserError("too small")) == 2
    assert capsys.readouterr().err == told
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert report(UserError("too small")) == 2
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # each process ends with its own status
    for name in ("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
        print_mistake("too small")
        assert capsys.readouterr().err == told
    print_mistake("too large")
    assert capsys.readouterr().err == "lit-lora: error\ntoo large\n"


def test_a_mistake_is_printed_if_the_process_that_was_to_print_it_has_ended(
    of_torchrun: TCPStore, monkeypatch: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(told_once, "SECONDS_TO_ASK", 1)
    of_torchrun.add("lit_lora of node 0, restart 0: too small begun", 1)
    print_mistake("too small")
    assert capsys.readouterr().err == "lit-lora: error\ntoo small\n"


def test_a_mistake_is_printed_if_no_store_answers(
    of_torchrun: TCPStore, monkeypatch: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_PORT", "none")
    print_mistake("too small")
    assert capsys.readouterr().err == "lit-lora: error\ntoo small\n"
