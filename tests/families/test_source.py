"""Where the parts of a pipeline are."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from lit_lora.errors import UserError
from lit_lora.families import Flux, ModelSource, StableDiffusion, StableDiffusion3
from lit_lora.families.source import check_hub
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


class TestHub:
    """What is not on this machine and cannot come from the hub is one error, at once."""

    @pytest.fixture(autouse=True)
    def _unknown(self) -> None:
        check_hub.cache_clear()

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=r"'nobody/no-such-model' is not on this machine.*cannot be reached"):
            ModelSource("nobody/no-such-model").lacks("text_encoder_3")

    def test_nobody_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        for family in (StableDiffusion, Flux):
            check_hub.cache_clear()
            with pytest.raises(
                UserError, match=f"the hub {endpoint} cannot be reached .*check the network, or name a local"
            ):
                family("nobody/no-such-model").read_configs()

    def test_something_that_is_no_repository(self) -> None:
        with pytest.raises(UserError, match="'a/b/c' is neither a folder nor the id of a repository"):
            ModelSource("a/b/c").index()

    def test_a_local_copy_needs_no_hub(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--me--mine" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "model_index.json").write_text(
            '{"_class_name": "StableDiffusionPipeline", "image_encoder": [null, null]}'
        )
        (tmp_path / "models--me--mine" / "refs").mkdir()
        (tmp_path / "models--me--mine" / "refs" / "main").write_text("abc")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        check_hub("me/mine", None)
