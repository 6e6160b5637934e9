from __future__ import annotations

import pytest

from lit_lora.datamodules import ShardSet
from lit_lora.errors import UserError


@pytest.mark.parametrize("repeats", [0.0, -1.0, float("nan"), float("inf"), 10_001])
def test_repeats_out_of_bounds(repeats):
    with pytest.raises(UserError, match=r"repeats=.* (of dogs must be above 0 and at most 10,000|is not finite)"):
        ShardSet(["dogs", "cats"], repeats)


@pytest.mark.parametrize("shards", ["", []])
def test_no_shards(shards):
    with pytest.raises(UserError, match="has no shards"):
        ShardSet(shards)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.3, float("nan")])
def test_shares_out_of_bounds(share):
    with pytest.raises(UserError, match=r"share=.* (of dogs must be above 0 and below 1|is not finite)"):
        ShardSet("dogs", share=share)


def test_share_and_repeats_exclude_each_other():
    with pytest.raises(UserError, match=r"dogs has repeats=2 and share=0.3; give one of them"):
        ShardSet("dogs", 2, share=0.3)
