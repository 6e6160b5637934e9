from __future__ import annotations

import pytest

from benchmarks.selection import selected

NAMES = ("cached", "cached, nf4", "cached, nf4, compiled", "images")


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (None, NAMES),
        ([], NAMES),
        (["cached"], ("cached",)),
        (["nf4"], ("cached, nf4", "cached, nf4, compiled")),
        (["images", "cached, nf4"], ("cached, nf4", "images")),
        (["compiled", "cached"], ("cached", "cached, nf4, compiled")),
        (["other"], ()),
    ],
)
def test_a_name_selects_itself_and_a_part_all_that_have_it(only: list[str] | None, expected: tuple[str, ...]) -> None:
    assert tuple(selected(NAMES, only)) == expected
