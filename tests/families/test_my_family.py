"""The family of docs/examples/my_family.py, a file outside the package, through every command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from lit_lora.cli import main
from lit_lora.datamodules.caching.open_cache import open_cache
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.draws import Draws
from tests.helpers import make_batches
from tests.tiny_pipelines import tiny_clip_config, tiny_vae

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def my_family(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that a user has written."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("my_family", None)
    import my_family

    return my_family


@pytest.fixture
def folder(my_family: Any, tmp_path: Path, tokenizer: CLIPTokenizer) -> Path:
    """A pipeline of that family."""
    torch.manual_seed(5)
    my_family.MyPipeline(
        vae=tiny_vae(5),
        text_encoder=CLIPTextModel(tiny_clip_config(tokenizer, 16)),
        tokenizer=tokenizer,
        transformer=my_family.MyTransformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
    ).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(folder: Path, session_shards: Path, tmp_path: Path) -> Callable[..., int]:
    """Run a command with a config of that family."""
    checkpoints = {"class_path": "AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path / "ckpt")}}
    samples = {"class_path": "SampleImages", "init_args": {"prompts": ["a"], "height": 16, "width": 16}}
    trainer = {"max_steps": 4, "val_check_interval": 2, "accelerator": "cpu", "default_root_dir": str(tmp_path / "run")}
    config = {
        "trainer": trainer | {"callbacks": [checkpoints, samples], "enable_progress_bar": False},
        "model": {
            "family": {
                "class_path": "my_family.MyFamily",
                "init_args": {"pretrained_model_name_or_path": str(folder)},
            },
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 4, "lora_alpha": 4}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
            "sampling": {"num_inference_steps": 2},
            "base_dtype": "float32",
        },
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {"train_shards": str(session_shards), "resolution": 16, "batch_size": 2, "val_samples": 4},
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    return lambda command, *arguments: main([command, "--config", str(path), *map(str, arguments)])


@pytest.mark.filterwarnings("ignore:no callback writes the images", "ignore:no ckpt_path is given")
def test_trains_validates_samples_and_saves(run: Callable[..., int], folder: Path, tmp_path: Path) -> None:
    assert run("fit") == 0
    adapter = next((tmp_path / "ckpt").glob("*.adapter"))
    assert {path.name for path in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "samples",
    }
    assert list((tmp_path / "run").rglob("samples/step-000000.png"))
    assert run("validate", "--ckpt_path", next((tmp_path / "ckpt").glob("*.ckpt"))) == 0
    assert run("predict") == 0
    drawn = ["--prompts", "a", "--steps", "2", "--height", "16", "--width", "16", "--family", "my_family.MyFamily"]
    assert main(["sample", "--adapter", str(adapter), "--out", str(tmp_path / "with.png"), *drawn]) == 0
    assert main(["sample", "--base", str(folder), "--out", str(tmp_path / "without.png"), *drawn]) == 0
    ours, base = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("with", "without"))
    assert np.abs(ours - base).max() > 4


def test_plans(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan") == 0
    assert "forward" in capsys.readouterr().out


def test_caches_text_without_its_padding(run: Callable[..., int], tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    cache, centred = tmp_path / "cache", ["--data.init_args.decoder.center_crop", "true"]
    assert run("cache", "--out", cache, "--dtype", "float32", *centred) == 0
    opened = open_cache(open_table(str(cache)))
    assert opened is not None
    assert opened.description.latent_shapes == {"16x16": [5, 8, 8]}
    assert opened.description.text_masks == {"encoder_hidden_states": "mask"}
    # A sample has as many tokens as its caption, not as the tokenizer's length.
    tokens = len(tokenizer("caption 0000").input_ids)
    assert tokens < tokenizer.model_max_length
    table = open_table(str(cache))
    span = table.spans(0)["safetensors"]
    with Path(table.locations[0]).open("rb") as file:
        file.seek(span[0])
        from safetensors.torch import load

        sample = load(file.read(span[1]))
    assert sample["text.encoder_hidden_states"].shape == (tokens, 16)
    assert sample["text.mask"].tolist() == [1] * tokens
    adapters = []
    for number, shards in enumerate(([], ["--data.init_args.train_shards", cache])):
        assert run("fit", *centred, *shards) == 0
        adapters.append(load_file(next((tmp_path / "ckpt").glob("*.adapter")) / "adapter_model.safetensors"))
        (tmp_path / "ckpt").rename(tmp_path / f"ckpt-{number}")
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_padding_does_not_matter(my_family: Any, folder: Path) -> None:
    """What a cache gives back, embeddings with zeros for padding, is denoised as the embeddings themselves."""
    family = my_family.MyFamily(str(folder))
    family.load(torch.float32)
    batch = make_batches(1)[0]
    text = family.encode_captions(batch["caption"])
    cut = {**text, "encoder_hidden_states": text["encoder_hidden_states"] * text["mask"][..., None]}
    assert not torch.equal(cut["encoder_hidden_states"], text["encoder_hidden_states"])
    results = []
    for embeddings in (text, cut):
        latents, conditioning = family.encode({**batch, "text_embeddings": embeddings}, Draws(0, batch["slot"]))
        results.append(family.denoise(latents, torch.tensor([100.0, 900.0]), conditioning))
    assert torch.equal(*results)


def test_a_size_that_does_not_fit(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "plan", "cache"):
        more = ["--data.init_args.decoder.center_crop", "true"] if command == "cache" else []
        assert run(command, "--data.init_args.resolution", "18", *more) == 2
        error = capsys.readouterr().err
        assert "MyFamily takes images whose sides are multiples of 4 px, not 18 x 18" in error
