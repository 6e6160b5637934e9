from __future__ import annotations

from lit_lora.tools.training.choices import Choice
from lit_lora.tools.training.screen import table


def test_long_reasons_go_on_below_where_they_began() -> None:
    choices = [
        Choice("captions", "from files", 'each after "sks dog"; 1 of 12 images have no file and get it alone', ""),
        Choice("rank", "16", "short", ""),
    ]
    assert table(choices).splitlines() == [
        'captions  from files  each after "sks dog"; 1 of 12 images have no file and get',
        "                      it alone",
        "rank      16          short",
    ]
