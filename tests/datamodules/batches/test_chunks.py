from __future__ import annotations

import pytest

from lit_lora.datamodules.batches.chunks import Chunks
from lit_lora.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, r"chunks\.count=0 is too small; it must be at least 1"),
        ({"samples": 0}, r"chunks\.samples=0 is too small"),
        ({"passes": 10**12}, r"chunks\.passes=1000000000000 is too large; it must be at most 1048576"),
        ({"steps": 10**12}, r"chunks\.steps=1000000000000 is too large"),
        ({"passes": 0}, r"chunks\.passes=0 is too small"),
        ({"steps": 0}, r"chunks\.steps=0 is too small"),
        ({"count": 3, "samples": 10}, r"chunks\.count=3 and chunks\.samples=10 exclude each other"),
        ({"passes": 2, "steps": 10}, r"chunks\.passes=2 and chunks\.steps=10 exclude each other"),
        ({"leftovers": "keep"}, r"leftovers='keep' is unknown; write 'drop' or 'pad'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        Chunks(**options)


@pytest.mark.parametrize(
    ("chunks", "number"), [(Chunks(), 1), (Chunks(7), 7), (Chunks(samples=30), 3), (Chunks(samples=1000), 1)]
)
def test_number_of_chunks(chunks, number):
    assert chunks.number(100) == number
