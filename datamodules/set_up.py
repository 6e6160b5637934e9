"""What a datamodule has once it is set up."""

from __future__ import annotations

from typing import TypeVar

from lit_lora.errors import UserError

T = TypeVar("T")


def set_up(value: T | None, what: str, stage: str) -> T:
    """A value that the datamodule's ``setup`` makes.

    Args:
        value: The value; None before ``setup``.
        what: What it is, for the error.
        stage: The stage of ``setup`` that makes it.

    Raises:
        UserError: If there is none yet.
    """
    if value is None:
        raise UserError(f"the {what} are not read yet; call setup({stage!r}) of the datamodule first")
    return value
