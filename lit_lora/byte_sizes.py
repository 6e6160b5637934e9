"""Parsing and formatting of byte sizes."""

from __future__ import annotations

import re

from lit_lora.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50}


def parse_bytes(name: str, value: int | str) -> int:
    """Parse a byte size such as ``140_000_000``, ``"140 MB"`` or ``"1.5TiB"``.

    Args:
        name: Name of the option, for the error message.
        value: Number of bytes, or a number with a unit.

    Raises:
        UserError: If the value is not a byte size, or is below 1 byte.
    """
    match = re.fullmatch(r"(\d{1,30}(?:_\d+)*(?:\.\d+)?)\s*([kmgtp]?i?)b?", str(value).strip().lower())
    factor = (_UNITS | _BINARY_UNITS).get(match[2]) if match else None
    if match is None or factor is None:
        raise UserError(f"{name}={value!r} is not a byte size; write for example 200GB, 1.5TiB or 200000000000")
    amount = int(float(match[1]) * factor)
    if amount < 1:
        raise UserError(f"{name}={value!r} is too small; it must be at least 1 byte")
    return amount


def format_bytes(amount: float) -> str:
    """A byte size in the decimal unit that leaves one to three digits before the point: ``12.3 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(amount) < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} PB"
