"""A folder holds one run of ``lit-lora train``: another one is refused, and the difference is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lit_lora.errors import UserError
from lit_lora.tools.training.request import CONFIG, RECORD, Request, claim

FIRST = Request("images", "embedded", given={"trainer.max_steps": 20, "seed_everything": 1})


def chosen(out: Path) -> Path:
    """A folder of a run that has its settings."""
    claim(out, FIRST)
    (out / CONFIG).touch()
    return out


def test_the_same_options_go_on(tmp_path: Path) -> None:
    claim(chosen(tmp_path), FIRST)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base": "sdxl"}, "base='embedded', not 'sdxl'"),
        ({"given": {"trainer.max_steps": 30, "seed_everything": 1}}, "trainer.max_steps=20, not trainer.max_steps=30"),
        ({"given": {"trainer.max_steps": 20}}, "seed_everything=1, not no seed_everything"),
        ({"given": {**FIRST.given, "model.seed": None}}, "no model.seed, not model.seed=None"),
    ],
)
def test_others_are_named(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"holds the run of {said}; name another folder with --out")):
        claim(chosen(tmp_path), FIRST._replace(**changed))


def test_a_run_without_settings_gives_way(tmp_path: Path) -> None:
    claim(tmp_path, FIRST)
    (tmp_path / "shards").mkdir()
    claim(tmp_path, FIRST._replace(base="sdxl"))
    assert not (tmp_path / "shards").exists()
    assert '"base": "sdxl"' in (tmp_path / RECORD).read_text()


def test_a_damaged_record(tmp_path: Path) -> None:
    (chosen(tmp_path) / RECORD).write_text('{"base": "emb')
    with pytest.raises(UserError, match=r"train\.json is damaged"):
        claim(tmp_path, FIRST)
