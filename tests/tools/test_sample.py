"""``lit-lora sample`` with bases of each family in each precision, and with a base of no known family."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lit_lora.cli import main
from tests.families.folders import FOLDERS

DRAWN = ["--prompts", "a star", "--steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fixture", FOLDERS.values())
def test_draws_in_each_precision(fixture: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also where the VAE keeps a dtype of its own."""
    folder = request.getfixturevalue(fixture)
    out = tmp_path / "drawn.png"
    assert main(["sample", "--base", str(folder), "--dtype", dtype, "--out", str(out), *DRAWN]) == 0
    assert out.stat().st_size > 0


def test_a_base_of_no_known_family(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPAGPipeline"}))
    assert main(["sample", "--base", str(folder), "--out", str(tmp_path / "drawn.png"), *DRAWN]) == 0


def test_a_size_that_does_not_fit_is_refused_before_weights_are_read(
    flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(flux_folder, folder)
    for file in [*folder.rglob("*.safetensors")]:
        file.unlink()
    assert main(["sample", "--base", str(folder), "--prompts", "a", "--height", "18"]) == 2
    assert "sides are multiples of 4 px, not 18 x" in capsys.readouterr().err


def test_a_family_that_cannot_be_imported(sd_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family, message in (("no_such.Family", "cannot be imported"), ("LoraDiffusion", "is not a subclass of")):
        assert main(["sample", "--base", str(sd_folder), "--family", family, *DRAWN]) == 2
        assert message in capsys.readouterr().err


def test_help_does_not_import_torch() -> None:
    code = """if True:
        import sys
        from lit_lora.cli import main
        try:
            main(["sample", "--help"])
        finally:
            assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
