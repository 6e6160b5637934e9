"""Minutes by the Keystroke-Level Model, and the table that shows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.keystrokes import WAYS, changed, chosen, minutes, typed

ROOT = Path(__file__).parents[2]


def test_the_models_times() -> None:
    assert typed("ab").seconds == pytest.approx(3 * 0.28 + 1.35)
    assert changed("abc", "d").seconds == pytest.approx(4 * 0.28 + 2 * (1.1 + 0.28 + 2 * 0.4 + 1.35))
    assert (chosen(1) + chosen(1)).seconds == pytest.approx(chosen(2).seconds)


def test_the_documentation_shows_them() -> None:
    text = (ROOT / "docs" / "compare.md").read_text()
    head, row = (re.search(rf"^\| *{start}.*$", text, re.MULTILINE) for start in (r"\| lit_lora", "minutes"))
    assert head is not None
    assert row is not None
    shown = [cell.split(",")[0].strip() for cell in row.group().strip("|").split("|")[1:]]
    assert dict(zip([cell.strip() for cell in head.group().strip("|").split("|")[1:]], shown, strict=True)) == {
        name: minutes(way) for name, way in WAYS.items()
    }
    result = (ROOT / "benchmarks" / "results" / "keystrokes.txt").read_text()
    assert {line.split()[0]: line.split()[-1] for line in result.splitlines()[2:]} == {
        name: minutes(way) for name, way in WAYS.items()
    }
