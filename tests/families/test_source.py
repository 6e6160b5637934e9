"""Where the parts of a pipeline are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from lit_lora.errors import UserError
from lit_lora.families import ModelSource, StableDiffusion3
from tests.tiny_pipelines import write_sd3


def test_what_the_index_says_is_lacking(sd3_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    assert not ModelSource(str(sd3_folder)).lacks("text_encoder_3")
    assert ModelSource(str(write_sd3(tmp_path / "without", tokenizer, t5=False))).lacks("text_encoder_3")


def test_a_part_that_is_listed_and_missing_is_an_error(sd3_folder: Path, tmp_path: Path) -> None:
    """Of a folder that was copied in part; T5's embeddings would be zeros otherwise."""
    folder = tmp_path / "base"
    shutil.copytree(sd3_folder, folder)
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(UserError, match="has no folder 'text_encoder_3'"):
        StableDiffusion3(str(folder)).load(torch.float32)


def test_without_an_index_the_folder_tells(sd3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd3_folder, folder)
    (folder / "model_index.json").unlink()
    assert not ModelSource(str(folder)).lacks("text_encoder_3")
    shutil.rmtree(folder / "text_encoder_3")
    assert ModelSource(str(folder)).lacks("text_encoder_3")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # diffusers passes it
def test_nothing_is_lacking_where_the_hub_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not ModelSource("nobody/no-such-model").lacks("text_encoder_3")
