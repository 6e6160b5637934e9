"""The exception for mistakes that the user can correct."""

from __future__ import annotations

from collections.abc import Iterable

from lit_lora.visible import visible_lines


class UserError(ValueError):
    """A wrong value, file or combination that the user can correct.

    The message gives the value, the bound and the next action. The command line prints it alone, without a traceback,
    and exits with status 2. Control characters other than line ends are shown as escapes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(visible_lines(message))


def check_least(least: float, **values: float | None) -> None:
    """Refuse values below a bound; None means that an option is not set.

    Raises:
        UserError: If a value is below the bound.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{name}={value} is too small; it must be at least {least}")


def check_above(bound: float, **values: float | None) -> None:
    """Refuse values that are not above a bound; None means that an option is not set.

    Raises:
        UserError: If a value is not above the bound.
    """
    for name, value in values.items():
        if value is not None and not value > bound:
            raise UserError(f"{name}={value} is too small; it must be above {bound}")


def check_most(most: float, because: str = "", /, **values: float | None) -> None:
    """Refuse values above a bound; None means that an option is not set.

    Args:
        most: The bound.
        because: Reason for the bound, which ends the message. Defaults to none.
        values: Values by the names of their options.

    Raises:
        UserError: If a value is above the bound.
    """
    for name, value in values.items():
        if value is not None and value > most:
            raise UserError(f"{name}={value} is too large; it must be at most {most}{because}")


def check_exclusive(**values: object) -> None:
    """Refuse options that exclude each other; a false value, such as None or 0, means that an option is not set.

    Raises:
        UserError: If more than one of the options is set.
    """
    given = [f"{name}={value}" for name, value in values.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; drop one of them")


def check_texts(option: str, names: Iterable[object]) -> None:
    """Refuse names that are no texts: YAML reads ``on`` and ``no`` as true and false, ``null`` as nothing and digits as a number.

    Args:
        option: Option that has the names.
        names: The names.

    Raises:
        UserError: If one is no text.
    """
    for name in names:
        if not isinstance(name, str):
            raise UserError(
                f"{option} has the key {name!r}, which is no text: YAML reads yes, no, on and off as true and false, and digits "
                f"as a number; write the key in quotes"
            )
