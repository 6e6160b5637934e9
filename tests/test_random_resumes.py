"""Runs with options drawn by chance that are stopped at any moment and resumed end as if nothing had happened.

``LIT_LORA_RESUMES=100 pytest -n 0 -s tests/test_random_resumes.py`` draws 100 runs with a new seed, which is printed and which
``LIT_LORA_RESUME_SEED`` sets. Without it the same few runs are tested each time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import differences
from tests.random_runs import runs_and_seed, saved, train_in_parts, train_whole

pytestmark = pytest.mark.slow

RUNS, SEED = runs_and_seed("LIT_LORA_RESUMES", "LIT_LORA_RESUME_SEED", usual=2)


@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_that_is_resumed_equals_one_that_was_never_stopped(
    number: int,
    request: pytest.FixtureRequest,
    encode_image: Callable[..., bytes],
    trainer_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    r = random.Random(f"{SEED} {number}")
    called = f"LIT_LORA_RESUME_SEED={SEED}, {number}"
    whole = train_whole(r, called, lambda _: None, request, encode_image, trainer_options, tmp_path)
    found = train_in_parts(r, whole, tmp_path / "parts", trainer_options)
    assert not list(differences(found, whole.seen))[:20]
    assert not list(differences(saved(tmp_path / "parts"), saved(whole.folder)))[:20]
