from __future__ import annotations

import pytest

from lit_lora.datamodules.loading.bad_samples import BadSampleReport, BadSamples
from lit_lora.errors import UserError


def test_keys_and_reasons_cannot_control_the_terminal():
    report = BadSampleReport("x.tar", "\x1b[2J\nEpoch 7", "the class '\x07' is unknown")
    bad = BadSamples(1, "bad samples", "skipped", "repair them")
    with pytest.warns(UserWarning, match=r"^bad sample \\x1b\[2J\\nEpoch 7 in x.tar, skipped: the class '\\x07' is"):
        bad.count([report])
    with pytest.raises(
        UserError, match=r"2 bad samples.*\n  \\x1b\[2J\\nEpoch 7 in x.tar: the class '\\x07' is unknown\n  b in"
    ):
        bad.count([BadSampleReport("x.tar", "b", "y")])
