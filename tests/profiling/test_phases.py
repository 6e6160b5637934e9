from __future__ import annotations

import pytest

from lit_lora.profiling.phases import add_listener, phase, remove_listener


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[str, ...]] = []

    def enter_phase(self, name: str) -> None:
        self.heard.append(("enter", name))

    def leave_phase(self, name: str, failed: bool) -> None:
        self.heard.append(("leave", name, "failed" if failed else "done"))


@pytest.fixture
def listener():
    listener = Listener()
    add_listener(listener)
    yield listener
    remove_listener(listener)


def test_phases_nest(listener):
    with phase("validation"), phase("sampling"):
        pass
    assert listener.heard == [
        ("enter", "validation"),
        ("enter", "sampling"),
        ("leave", "sampling", "done"),
        ("leave", "validation", "done"),
    ]


def test_an_error_is_told_and_goes_on(listener):
    with pytest.raises(KeyError), phase("sampling"):
        raise KeyError
    assert listener.heard[-1] == ("leave", "sampling", "failed")


def test_a_listener_hears_once_and_no_more_after_it_has_gone(listener):
    add_listener(listener)
    with phase("one"):
        pass
    assert len(listener.heard) == 2
    remove_listener(listener)
    remove_listener(listener)
    with phase("two"):
        pass
    assert len(listener.heard) == 2


def test_who_comes_or_goes_inside_a_phase_hears_of_whole_ones_only(listener):
    late = Listener()
    with phase("load"):
        add_listener(late)
        remove_listener(listener)
    remove_listener(late)
    assert listener.heard == [("enter", "load")]
    assert late.heard == []


def test_nothing_is_made_while_nobody_listens():
    assert phase("a") is phase("b")
