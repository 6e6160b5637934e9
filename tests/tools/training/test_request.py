"""A folder holds one run of ``lit-lora train``: another one is refused, and the difference is named."""

from __future__ import annotations

import json
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
    (out / CONFIG).write_text("edited")
    return out


def trained(out: Path) -> Path:
    """A folder of a run that has saved a checkpoint."""
    (chosen(out) / "lightning_logs" / "version_0" / "checkpoints").mkdir(parents=True)
    (out / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt").touch()
    return out


def test_the_same_options_go_on(tmp_path: Path) -> None:
    claim(trained(tmp_path), FIRST)
    assert (tmp_path / CONFIG).read_text() == "edited"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base": "sdxl"}, "base='embedded', not 'sdxl'"),
        ({"given": {"trainer.max_steps": 30, "seed_everything": 1}}, "trainer.max_steps=20, not 30"),
        ({"given": {"trainer.max_steps": 20}}, "seed_everything=1, not without it"),
        ({"given": {**FIRST.given, "model.seed": None}}, "no model.seed, not None"),
    ],
)
def test_others_are_named(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"holds a run with {said}; give the same options to resume")):
        claim(trained(tmp_path), FIRST._replace(**changed))


@pytest.mark.parametrize(
    ("changed", "repacked"),
    [({"base": "sdxl"}, False), ({"given": {}}, False), ({"trigger": "sks"}, True), ({"max_bad": 3}, True)],
)
def test_a_run_that_has_trained_nothing_gives_way(
    changed: dict[str, Any], repacked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows from its options is removed; its settings may have been edited and are kept beside."""
    chosen(tmp_path)
    for name in ("shards", "cache", "prompts"):
        (tmp_path / name).mkdir()
    claim(tmp_path, FIRST._replace(**changed))
    assert (tmp_path / "shards").exists() is not repacked
    assert not any((tmp_path / name).exists() for name in (CONFIG, "cache", "prompts"))
    assert (tmp_path / "config.earlier.yaml").read_text() == "edited"
    assert "config.earlier.yaml" in capsys.readouterr().out
    assert json.loads((tmp_path / RECORD).read_text()) == FIRST._replace(**changed).record


def test_a_finished_run_stays(tmp_path: Path) -> None:
    """Also if its options had it save its checkpoints elsewhere."""
    (chosen(tmp_path) / "finished.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run with"):
        claim(tmp_path, FIRST._replace(base="sdxl"))


def test_a_damaged_record(tmp_path: Path) -> None:
    (chosen(tmp_path) / RECORD).write_text('{"base": "emb')
    with pytest.raises(UserError, match=r"train\.json is damaged"):
        claim(tmp_path, FIRST)
