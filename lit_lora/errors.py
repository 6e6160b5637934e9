"""The exception for mistakes that the user can correct."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

from lit_lora.visible import visible_lines


class UserError(ValueError):
    """A wrong value, file or combination that the user can correct.

    The message gives the value, the bound and the next action. The command line prints it alone, without a traceback,
    and exits with status 2. Control characters other than line ends are shown as escapes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(visible_lines(message))


def _wrong_numbers(
    values: Mapping[str, float | None], is_wrong: Callable[[float], bool]
) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        try:
            if value is not None and is_wrong(value):
                yield name, value
        except TypeError as error:
            raise UserError(f"{name}={value!r} is not a number") from error


def check_least(least: float, **values: float | None) -> None:
    """Refuse values below a bound, and NaN; None means that an option is not set.

    Raises:
        UserError: If a value is below the bound.
    """
    for name, value in _wrong_numbers(values, lambda value: not value >= least):
        raise UserError(f"{name}={value} is too small; it must be at least {least}")


def check_whole(least: int, **values: int | None) -> None:
    """Refuse values that are no whole numbers or below a bound; None means that an option is not set.

    Raises:
        UserError: If a value is not a whole number, which true and false are not, or below the bound.
    """
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise UserError(f"{name}={value!r} is a {type(value).__name__}; write a whole number of at least {least}")
    check_least(least, **values)


def check_above(bound: float, **values: float | None) -> None:
    """Refuse values that are not above a bound; None means that an option is not set.

    Raises:
        UserError: If a value is not above the bound.
    """
    for name, value in _wrong_numbers(values, lambda value: not value > bound):
        raise UserError(f"{name}={value} is too small; it must be above {bound}")


def check_most(most: float, because: str = "", /, **values: float | None) -> None:
    """Refuse values above a bound, and NaN; None means that an option is not set.

    Args:
        most: The bound.
        because: Reason for the bound, which ends the message. Defaults to none.
        values: Values by the names of their options.

    Raises:
        UserError: If a value is above the bound.
    """
    for name, value in _wrong_numbers(values, lambda value: not value <= most):
        raise UserError(f"{name}={value} is too large; it must be at most {most}{because}")


def check_kind(kind: type[Any], example: str, /, **values: object) -> None:
    """Refuse values of another class than an option takes, such as a name or a class in place of an object.

    Args:
        kind: Class of the option's values; None means that it is not set.
        example: A value of the option, as Python has it.
        values: Values by the names of their options.

    Raises:
        UserError: If a value is of another class.
    """
    for name, value in values.items():
        if value is None or isinstance(value, kind):
            continue
        told = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        told = repr(value) if isinstance(value, str | bool | int | float) else told
        raise UserError(f"{name} is {told}, and takes an object of {kind.__name__}, such as {example}")


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
