"""Families of flow matching through the command line: fit, cache, plan, sample, and their files in plain diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from lit_lora.cli import main
from lit_lora.families import Flux, StableDiffusion3
from tests.families.folders import FLOW_FOLDERS
from tests.tiny_pipelines import write_sd3

pytestmark = pytest.mark.filterwarnings("ignore:FluxKontext is trained without source images")

FAMILIES = [(kind.__name__, fixture) for kind, fixture in FLOW_FOLDERS.items()]


@pytest.fixture
def config(session_shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a config of a run over the session's shards."""

    def write(family: str, folder: Path, shards: Path = session_shards, **family_options: Any) -> Path:
        document = {
            "trainer": {
                "max_steps": 3,
                "default_root_dir": str(tmp_path / "run"),
                "accelerator": "cpu",
                "logger": False,
                "callbacks": [{"class_path": "AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path / "ckpt")}}],
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
            "model": {
                "family": {
                    "class_path": family,
                    "init_args": {"pretrained_model_name_or_path": str(folder)} | family_options,
                },
                "adapter": {"class_path": "LoraConfig", "init_args": {"r": 4, "lora_alpha": 4}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
                "base_dtype": "float32",
            },
            "data": {
                "class_path": "WebDatasetDataModule",
                "init_args": {"train_shards": str(shards), "resolution": 16, "batch_size": 2, "val_samples": 4},
            },
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(document))
        return path

    return write


def adapter_of(tmp_path: Path) -> Path:
    return next((tmp_path / "ckpt").glob("*.adapter"))


@pytest.mark.parametrize(("family", "fixture"), FAMILIES)
def test_adapter_draws_the_same_images_in_plain_diffusers(
    family: str, fixture: str, config: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    assert main(["fit", "--config", str(config(family, folder))]) == 0
    adapter = adapter_of(tmp_path)
    options = ["--seed", "7", "--steps", "4", "--guidance_scale", "3.0", "--height", "32", "--width", "32"]
    for name, arguments in (("ours", ["--adapter", str(adapter)]), ("base", ["--base", str(folder)])):
        drawn = ["--prompts", "a red star", "--out", str(tmp_path / name), *options]
        assert main(["sample", *arguments, *drawn]) == 0
    ours, base = (np.asarray(Image.open(tmp_path / name / "0000.png")).astype(int) for name in ("ours", "base"))

    kind = next(kind for kind in FLOW_FOLDERS if kind.__name__ == family)(str(folder))
    kind.load(torch.float32)
    inputs = {"guidance_scale": 3.0} | kind.prompt_inputs(["a red star"], 3.0)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(adapter)
    drawn = {"num_inference_steps": 4, "height": 32, "width": 32}
    if kind.takes_sources:  # this pipeline draws about a megapixel otherwise
        drawn["max_area"] = 32 * 32
    theirs = pipeline(**inputs, generator=torch.Generator().manual_seed(7), output_type="np", **drawn).images[0]
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1
    assert np.abs(ours - base).max() > 4  # the adapter counts


@pytest.mark.parametrize(("family", "fixture"), FAMILIES)
def test_trains_from_a_cache(
    family: str,
    fixture: str,
    config: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = request.getfixturevalue(fixture)
    centred = ["--data.init_args.decoder.center_crop", "true"]
    live = config(family, folder)
    assert main(["cache", "--config", str(live), "--out", str(tmp_path / "cache"), "--dtype", "float32", *centred]) == 0
    results = []
    for shards in (None, tmp_path / "cache"):
        path = config(family, folder, **({} if shards is None else {"shards": shards}))
        assert main(["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path / "r"), *centred]) == 0
        results.append(load_file(adapter_of(tmp_path) / "adapter_model.safetensors"))
        for path in (tmp_path / "ckpt").iterdir():
            path.rename(tmp_path / f"{len(results)}-{path.name}")
    for name, value in results[0].items():
        assert (value - results[1][name]).norm() <= 1e-3 * value.norm().clamp(min=0.1), name


@pytest.mark.filterwarnings("ignore:no callback writes the images", "ignore:no ckpt_path is given")
@pytest.mark.parametrize("t5", [True, False])
def test_t5_may_be_left_out(t5: bool, config: Callable[..., Path], tmp_path: Path, tokenizer: Any) -> None:
    """By an option where the pipeline has it, or since the pipeline does not have it."""
    folder = write_sd3(tmp_path / "sd3", tokenizer, t5=t5)
    path = config("StableDiffusion3", folder, t5=False)
    assert main(["fit", "--config", str(path)]) == 0
    family = StableDiffusion3(str(folder), t5=False)
    family.load(torch.float32, without={"vae"})
    assert not {"text_encoder_3", "tokenizer_3"} & family.encoders.keys()
    embeddings = family.encode_captions(["a red star"])["encoder_hidden_states"]
    assert embeddings.shape == (1, 32 + 256, 48)
    assert not embeddings[:, 32:].any()
    assert main(["predict", "--config", str(path), "--model.sampling.num_inference_steps", "2"]) == 0


def test_two_guidance_scales_are_told_to_the_denoiser(flux_folder: Path) -> None:
    def conditioning(scale: float) -> Any:
        family = Flux(str(flux_folder), train_guidance_scale=scale)
        family.load(torch.float32, without={"vae", "text"})
        text = {"encoder_hidden_states": torch.zeros(2, 3, 32), "pooled": torch.zeros(2, 16)}
        return family.conditioning(text, {}, torch.zeros(2, 4, 8, 8))["guidance"].tolist()

    assert conditioning(3.5) == [3.5, 3.5]
    assert conditioning(1.0) == [1.0, 1.0]
