from __future__ import annotations

from typing import Literal

import pytest

from lit_lora.tools import run_tool


def command(
    names: list[str],
    scales: float | list[float] | None = None,
    count: int = 2,
    kind: Literal["a", "b"] | None = None,
    end: Literal["c", "d"] = "c",
    quick: bool = False,
    prompt: str = "",
) -> None:
    """Do something.

    Args:
        names: What.
        scales: How much; one for each, or one for all.
        count: How often.
        kind: In what way; defaults to all.
        end: Where.
        quick: Whether to hurry.
        prompt: Text.
    """


def test_options_in_plain_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        run_tool(command, ["--help"], "x")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "names ... What. (type: list[str])",
        "--scales SCALES How much; one for each, or one for all. (type: float or list[float])",
        "--count COUNT How often. (type: int, default: 2)",
        "--kind KIND In what way; defaults to all. (one of a, b)",
        "--end {c,d} Where. (default: c)",
        "--quick {true,false} Whether to hurry. (default: false)",
        "--prompt PROMPT Text. (type: str)",
        "-h, --help Show this help message and exit.",
    ):
        assert line in lines
