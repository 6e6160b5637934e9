from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_lora.tools.training.base import base_names, find_base
from lit_lora.tools.training.choices import Choice, Settings
from lit_lora.tools.training.config import comments_of, make_config, write_yaml

SETTINGS = Settings(768, True, 2, batch_size=2, accumulate=3, steps=100, rank=8, lr=0.1, quantization="Int8")


def _config(base: str = "sdxl", settings: Settings = SETTINGS, **given: Any) -> dict[str, Any]:
    return make_config(
        find_base(base), settings, Path("out"), {"train_shards": "out/cache"}, "sks, ", ["sks, a"], given
    )


def test_all_choices_are_in_the_config() -> None:
    config = _config()
    trainer, model, data = config["trainer"], config["model"], config["data"]["init_args"]
    assert (trainer["max_steps"], trainer["accumulate_grad_batches"], trainer["val_check_interval"]) == (100, 3, 30)
    assert (model["adapter"]["init_args"]["r"], model["adapter"]["init_args"]["lora_alpha"]) == (8, 8)
    assert model["optimizer"]["init_args"]["lr"] == 0.1
    assert model["parameter_groups"] == [{"pattern": "*.lora_B.*", "lr_ratio": 8.0}]
    assert model["quantization"] == {"class_path": "lit_lora.quantization.Int8"}
    assert (data["batch_size"], data["resolution"], data["val_samples"]) == (2, 768, 2)
    assert data["buckets"]["divisor"] == 64
    decoder = {"center_crop": True, "random_flip": False, "background": "white", "captions": {"prefix": "sks, "}}
    assert data["decoder"] == decoder
    assert data["chunks"] == {"leftovers": "pad"}


def test_images_are_drawn_at_the_size_that_is_trained() -> None:
    def size(resolution: int) -> tuple[Any, Any]:
        config = _config(settings=replace(SETTINGS, resolution=resolution))
        [draws] = [one for one in config["trainer"]["callbacks"] if one["class_path"].endswith("SampleImages")]
        return draws["init_args"].get("height"), draws["init_args"].get("width")

    assert size(768) == (768, 768)
    assert size(1024) == (None, None), "the base's own"


def test_without_validation_and_drawing() -> None:
    names = [one["class_path"].rpartition(".")[2] for one in _config()["trainer"]["callbacks"]]
    assert names == ["AdapterCheckpoint", "SampleImages", "BaseLoss", "ImageWriter", "RunReport"]
    plain = _config(settings=replace(SETTINGS, val_samples=0, draws=False))["trainer"]["callbacks"]
    assert [one["class_path"].rpartition(".")[2] for one in plain] == ["AdapterCheckpoint", "RunReport"]
    assert "monitor" not in plain[0]["init_args"]


def test_what_is_given_wins() -> None:
    given: dict[str, Any] = {
        "trainer.max_steps": 5,
        "model.memory.vae_tiling": True,
        "model.sampling.guidance_scale": 2,
    }
    config = _config(**given)
    assert config["trainer"]["max_steps"] == 5
    assert config["model"]["memory"]["vae_tiling"] is True
    assert config["model"]["sampling"] == {"guidance_scale": 2}


def test_another_class_comes_without_the_options_of_the_one_before() -> None:
    expected = {"class_path": "FromFile", "init_args": {"path": "x"}}
    for key in ("model.adapter", "model.adapter.class_path"):
        given: dict[str, Any] = {"model.adapter.init_args.path": "x", key: "FromFile"}
        assert _config(**given)["model"]["adapter"] == expected


@pytest.mark.parametrize("name", ["LoraConfig", "peft.LoraConfig"])
@pytest.mark.parametrize("key", ["model.adapter", "model.adapter.class_path"])
def test_the_same_class_keeps_its_options(key: str, name: str) -> None:
    adapter = _config(**{"model.adapter.init_args.r": 3, key: name})["model"]["adapter"]
    assert adapter["class_path"] == name
    assert adapter["init_args"] == _config()["model"]["adapter"]["init_args"] | {"r": 3}


@pytest.mark.parametrize("base", base_names())
def test_the_schedule_is_as_long_as_the_run(base: str) -> None:
    options = _config(base)["model"]["lr_scheduler"]["init_args"]
    assert options.get("T_max", 100) == 100
    assert options.get("total_iters", 10) == 10


def test_yaml_with_comments_reads_back() -> None:
    config = _config()
    choices = [Choice("rank", "8", "as given", "model.adapter"), Choice("steps", "100", "few", "trainer.max_steps")]
    text = write_yaml(config, comments_of(choices, cached="train_shards"))
    assert yaml.safe_load(text) == config
    assert "  # steps: 100. Few.\n  max_steps: 100\n" in text
    assert "  # rank: 8. As given.\n  adapter:\n" in text
    assert "    # Made by lit-lora cache from the folder shards beside it.\n    train_shards: out/cache\n" in text
