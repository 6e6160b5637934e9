from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_lora.errors import UserError
from lit_lora.tools.training.base import base_names, find_base


def test_names_are_those_of_the_shipped_configs() -> None:
    assert {"embedded", "sd15", "sdxl", "flux_dev", "z_image"} <= set(base_names())
    assert "demo" not in base_names()
    base = find_base("embedded")
    assert base.template["model"]["family"]["init_args"]["pretrained_model_name_or_path"] == "embedded"
    assert (base.size, base.is_embedded) == (32, True)
    assert find_base("sd21_v").size == 768


def test_the_family_of_a_folder_is_found(sdxl_folder: Path) -> None:
    base = find_base(str(sdxl_folder))
    family = base.template["model"]["family"]
    assert family["class_path"] == "lit_lora.families.StableDiffusionXL"
    assert family["init_args"]["pretrained_model_name_or_path"] == str(sdxl_folder)
    assert (base.name, base.size) == ("sdxl", 16)
    assert find_base("sdxl").template["model"]["family"] != family, "each call has a config of its own"


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read all
    with pytest.raises(UserError, match=f"base='{tmp_path}' may not be read; change its permissions"):
        find_base(str(tmp_path))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "give --base: embedded, .*sdxl"),
        ("sdxxl", "base='sdxxl' is no folder, no file, and none of the known names: embedded, .*sdxl"),
        ("demo", "base='demo' is no folder"),
        (".", r"base='\.' is of no known family \(a folder without model_index.json\)"),
    ],
)
def test_an_unknown_base(base: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        find_base(base)
