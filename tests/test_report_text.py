from __future__ import annotations

from lit_lora.report_text import format_reason


def test_a_long_reason_goes_on_below_its_file() -> None:
    lines = format_reason("  1  a  name.webp: " + "word " * 20).splitlines()
    assert lines[0].startswith("  1  a  name.webp: word")
    assert [line.startswith("     word") for line in lines[1:]] == [True]
    assert max(map(len, lines)) <= 80
