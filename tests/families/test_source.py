"""Where the parts of a pipeline are."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora.errors import UserError
from lit_lora.families import Flux, ModelSource, StableDiffusion, StableDiffusion3
from lit_lora.families.hub import check_hub, repository_files
from lit_lora.families.variants import found_variant
from tests.tiny_pipelines import write_sd3

VAE_FILE = "diffusion_pytorch_model"


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


def test_weights_that_may_not_be_read(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("No such file or directory")  # as safetensors says

    source = ModelSource(str(sd3_folder))
    with pytest.raises(UserError, match=r"cannot load 'vae' of .*No such file or directory$"):
        source.load("vae", missing)
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith(".safetensors"))
    with pytest.raises(
        UserError, match=r"cannot load 'vae' of .*vae/\S+.safetensors may not be read: change its permissions$"
    ):
        source.load("vae", missing)


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
        with socket.socket() as deaf:  # it has its port, and does not listen
            deaf.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
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


def as_variant(folder: Path, name: str, *parts: str) -> None:
    """Rename the weight files of parts."""
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_suffix(f".{name}.safetensors"))


class TestVariant:
    """A variant is found where there are no other files, and the files without one come first."""

    @pytest.fixture
    def folder(self, sd_folder: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(sd_folder, folder)
        return folder

    @pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), ("unet",), ("vae", "text_encoder")])
    def test_found_by_itself(self, folder: Path, sd_folder: Path, parts: tuple[str, ...]) -> None:
        as_variant(folder, "fp16", *parts)
        family, plain = StableDiffusion(str(folder)), StableDiffusion(str(sd_folder))
        for one in (family, plain):
            one.load(torch.float32)
        for name, value in plain.state_dict().items():
            assert torch.equal(family.state_dict()[name], value)
        whole = len(parts) == 3
        assert family.source.options(["vae", "unet", "text_encoder", "tokenizer"]) == (
            {"variant": "fp16"} if whole else {}
        )

    def test_explicit_ones_win(self, folder: Path) -> None:
        weights = load_file(folder / "vae" / f"{VAE_FILE}.safetensors")
        save_file({name: value + 1 for name, value in weights.items()}, folder / "vae" / f"{VAE_FILE}.fp16.safetensors")
        for variant, offset in ((None, 0), ("fp16", 1)):
            family = StableDiffusion(str(folder), variant=variant)
            family.load(torch.float32, without={"text", "denoiser"})
            assert torch.equal(family.vae.quant_conv.bias, weights["quant_conv.bias"] + offset)

    def test_several_are_a_choice(self, folder: Path) -> None:
        as_variant(folder, "fp16", "vae")
        shutil.copy(folder / "vae" / f"{VAE_FILE}.fp16.safetensors", folder / "vae" / f"{VAE_FILE}.bf16.safetensors")
        with pytest.raises(UserError, match=r"'vae' of .* variants bf16 and fp16 alone; set variant to one of them"):
            StableDiffusion(str(folder)).load(torch.float32)

    def test_files_in_parts(self) -> None:
        names = ["model-00001-of-00002.fp16.safetensors", "model.fp16-00002-of-00002.safetensors", "config.json"]
        assert found_variant([*names, "openvino_model.bin"], "here") == "fp16"
        assert found_variant([*names, "pytorch_model-00001-of-00002.bin"], "here") is None

    def test_on_the_hub(self, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Here in the local copy of an earlier download."""
        copy = tmp_path / "models--me--mine"
        shutil.copytree(sd_folder, copy / "snapshots" / "abc")
        (copy / "refs").mkdir()
        (copy / "refs" / "main").write_text("abc")
        as_variant(copy / "snapshots" / "abc", "fp16", "unet")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        repository_files.cache_clear()
        source = ModelSource("me/mine")
        assert [source.variant_of(part) for part in ("unet", "vae")] == ["fp16", None]
        repository_files.cache_clear()
