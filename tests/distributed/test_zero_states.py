import pytest
import torch

from lit_lora.distributed.zero_states import check_dropped
from lit_lora.errors import UserError


def test_a_group_begins_anew_as_a_whole() -> None:
    one, two, three = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.AdamW([{"params": [one, two]}, {"params": [three]}])
    (one.sum() + two.sum()).backward()
    optimizer.step()
    before = dict(optimizer.state)
    check_dropped(optimizer, before)
    del optimizer.state[one]
    with pytest.raises(UserError, match="1 of 2 parameters in group 0 of AdamW begin anew"):
        check_dropped(optimizer, before)
    del optimizer.state[two]
    check_dropped(optimizer, before)
