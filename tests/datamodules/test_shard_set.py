from __future__ import annotations

import pytest

from lit_lora.datamodules import ShardSet
from lit_lora.errors import UserError


@pytest.mark.parametrize("repeats", [0.0, -1.0, float("nan"), float("inf"), 10_001])
def test_repeats_out_of_bounds(repeats):
    with pytest.raises(UserError, match=r"repeats=.* of dogs must be above 0 and at most 10,000"):
        ShardSet(["dogs", "cats"], repeats)


@pytest.mark.parametrize("shards", ["", []])
def test_no_shards(shards):
    with pytest.raises(UserError, match="has no shards"):
        ShardSet(shards)
