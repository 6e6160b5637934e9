from __future__ import annotations

import pytest

from lit_lora.byte_sizes import format_bytes, parse_bytes
from lit_lora.errors import UserError


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        (12, 12),
        ("140_000_000", 140_000_000),
        ("300GB", 300 * 10**9),
        (" 1.5 TiB ", 3 * 2**39),
        ("2k", 2000),
        ("7 b", 7),
        ("4mib", 4 << 20),
    ],
)
def test_what_people_write(text, amount):
    assert parse_bytes("budget", text) == amount


@pytest.mark.parametrize("text", ["", "much", "-3GB", "_5", "1__0", "9" * 400, "3 XB", "1.2.3", "GB"])
def test_what_is_no_amount(text):
    with pytest.raises(UserError, match=r"budget=.* is not a byte size; write for example 200GB"):
        parse_bytes("budget", text)


def test_nothing_is_too_small():
    with pytest.raises(UserError, match="budget='0 GB' is too small"):
        parse_bytes("budget", "0 GB")


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_345_678_901, "12.3 GB"),
        (1.4e12, "1.4 TB"),
        (5e18, "5000.0 PB"),
    ],
)
def test_what_people_read(amount, text):
    assert format_bytes(amount) == text
