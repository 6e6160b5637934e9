from __future__ import annotations

import pytest

from lit_lora.datamodules.staging.staging import Staging
from lit_lora.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dir": ""}, r"chunks\.staging\.dir is empty"),
        ({"dir": "x", "budget": "much"}, r"chunks\.staging\.budget='much' is not a byte size"),
        ({"dir": "x", "budget": 0}, r"chunks\.staging\.budget=0 is too small"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        Staging(**options)
