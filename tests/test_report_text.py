from __future__ import annotations

import pytest

from lit_lora.report_text import format_duration, format_reason


def test_a_long_reason_goes_on_below_its_file() -> None:
    lines = format_reason("  1  a  name.webp: " + "word " * 20).splitlines()
    assert lines[0].startswith("  1  a  name.webp: word")
    assert [line.startswith("     word") for line in lines[1:]] == [True]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0.0 s"),
        (0.0042, "4.2 ms"),
        (0.097, "97 ms"),
        (0.0996, "0.1 s"),
        (0.5, "0.5 s"),
        (725, "12 min 5 s"),
        (2 * 86400 + 10800, "2 d 3 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, told: str) -> None:
    assert format_duration(seconds) == told
