"""Which rows of a table are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def selected(names: Iterable[str], only: Sequence[str] | None) -> list[str]:
    """The names that ``--only`` selects, in their order.

    Args:
        names: Names of all rows.
        only: Names of rows; what is no row's name selects all rows whose names contain it. None or none selects all rows.
    """
    names = list(names)
    if not only:
        return names
    whole, parts = set(only) & set(names), set(only) - set(names)
    return [name for name in names if name in whole or any(part in name for part in parts)]
