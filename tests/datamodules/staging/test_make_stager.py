from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from lit_lora.datamodules.staging.make_stager import checked_budget
from lit_lora.datamodules.staging.staging import Staging


def test_without_a_budget_it_is_that_of_the_two_largest_chunks(tmp_path):
    chunks: Any = SimpleNamespace(chunk_bytes=np.array([300, 500, 400]))
    assert checked_budget(Staging(str(tmp_path)), chunks) == 900
    assert checked_budget(Staging(str(tmp_path), "2kB"), chunks) == 2000
