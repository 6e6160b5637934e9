"""A kept help text is shown as long as nothing has changed that it was made from, and only then."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lit_lora.kept_help import asks_for_help, print_help

FIT = ["fit", "--help"]


class Command:
    """Prints its text as argparse does, and counts how often it was asked."""

    def __init__(self, text: str = "usage: …\n", status: int = 0) -> None:
        self.text, self.status, self.calls = text, status, 0

    def __call__(self) -> None:
        self.calls += 1
        print(self.text, end="")
        raise SystemExit(self.status)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    os.utime(tmp_path, ns=(0, 0))
    (tmp_path / "cache").mkdir()
    os.utime(tmp_path, ns=(0, 0))
    return tmp_path / "cache"


def test_the_second_call_prints_the_kept_text(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Command(), Command("another text")
    assert [print_help(FIT, first), print_help(FIT, second)] == [0, 0]
    assert capsys.readouterr().out == first.text * 2
    assert [first.calls, second.calls] == [1, 0]


@pytest.mark.parametrize("change", ["arguments", "width", "variable", "source", "package", "damage"])
def test_a_change_makes_the_text_again(
    change: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("some_library")
    module.__file__ = str(tmp_path / "cache" / "some_library.py")
    Path(module.__file__).write_text("")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    print_help(FIT, Command("old"))
    arguments = ["plan", "--help"] if change == "arguments" else FIT
    if change == "width":
        monkeypatch.setenv("COLUMNS", "123")
    elif change == "variable":
        monkeypatch.setenv("NO_COLOR", "1")
    elif change == "source":
        Path(module.__file__).write_text("changed")
    elif change == "package":
        (tmp_path / "new_package").mkdir()
    elif change == "damage":
        next(cache.rglob("*.json")).write_text('{"text": "ol')
    print_help(arguments, Command("new"))
    assert capsys.readouterr().out == "oldnew"


def test_without_a_cache_folder_nothing_is_kept(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.rmdir()
    cache.write_text("a file where the folder would be")
    command = Command()
    assert [print_help(FIT, command), print_help(FIT, command)] == [0, 0]
    assert capsys.readouterr().out == command.text * 2


def test_a_failure_is_not_kept(cache: Path) -> None:
    command = Command("", status=2)
    assert [print_help(FIT, command), print_help(FIT, command)] == [2, 2]
    assert command.calls == 2


def test_what_asks_for_help() -> None:
    assert asks_for_help(FIT)
    assert asks_for_help(["adapter", "merge", "-h"])
    assert not asks_for_help(["fit", "--config", "x.yaml", "--help"])
    assert not asks_for_help(["fit", "--data.help", "WebDatasetDataModule"])
    assert not asks_for_help(["--help"])
