from __future__ import annotations

import pytest

from lit_lora.errors import UserError
from lit_lora.visible import visible, visible_lines


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a fox, Füchse 狐.jpg", "a fox, Füchse 狐.jpg"),
        ("\x1b[31mred.jpg", "\\x1b[31mred.jpg"),
        ("a\nlit-lora: done\r", "a\\nlit-lora: done\\r"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("a\u2028b\x85\x9b2J\x7f\0", "a\\u2028b\\x85\\x9b2J\\x7f\\x00"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_nothing_in_a_name_controls_the_terminal(name, shown):
    assert visible(name) == shown
    assert shown.encode().decode().isprintable()


def test_long_names_keep_both_ends():
    shown = visible("a" * 5000 + ".jpg")
    assert len(shown) == 300
    assert shown.startswith("aaa")
    assert shown.endswith("aaa.jpg")
    assert "…" in shown
    assert visible("a" * 300) == "a" * 300
    assert len(visible("\n" * 10_000)) <= 600


def test_errors_keep_their_line_ends_and_nothing_else():
    assert visible_lines("two files:\n  \x1b[2Ja\r\n") == "two files:\n  \\x1b[2Ja\\r\n"
    assert str(UserError("first\n  \x1b[2J")) == "first\n  \\x1b[2J"
