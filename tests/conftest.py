"""Tiny models in the folder format of diffusers, and tiny shards."""

from __future__ import annotations

import tests.warm_imports  # noqa: F401  # isort: skip  # before all others, since they import the same libraries

import gc
import io
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import HealthCheck, settings
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lit_lora.embedded import base_path
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from tests.families.tiny import MODULES, VARIANTS
from tests.garbage import collect_seldom
from tests.helpers import tiny_unet
from tests.quick_configs import read_classes_once
from tests.tiny_pipelines import tiny_clip_config, tiny_vae, write_flux, write_sd3

# Tests never depend on time, nor on how fast a busy machine draws their examples.
settings.register_profile("without time", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("without time")

Members = Mapping[str, bytes]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first: workers that are done early then share many quick tests, and none is left with a slow one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_configure() -> None:
    read_classes_once()


def pytest_collectstart() -> None:
    gc.disable()  # what is collected stays until the end


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    collect_seldom()


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models spend more on waking threads than on arithmetic


@pytest.fixture(autouse=True)
def _no_server_goes_on() -> Iterator[None]:
    """One whose socket alone is closed takes a core until the tests end."""
    yield
    left = [thread.name for thread in threading.enumerate() if "serve_forever" in thread.name]
    assert not left, f"not shut down: {left}"


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(base_path(), subfolder="tokenizer")


@pytest.fixture(scope="session")
def sd_folder(deep_sd_folder: Path) -> Path:
    """A Stable Diffusion pipeline with random weights for images of 16 px."""
    return deep_sd_folder


@pytest.fixture(scope="session")
def deep_sd_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """The same also where ``sd_folder`` is the pipeline with fewer layers: its UNet halves and doubles the resolution."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "sd"
    unet = tiny_unet()
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_clip_config(tokenizer, 16)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shallow_sd_folder(deep_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with fewer layers in its UNet: what is done for each of them takes most of the time of many tests."""
    folder = tmp_path_factory.mktemp("models") / "shallow-sd"
    shutil.copytree(deep_sd_folder, folder)
    torch.manual_seed(1)
    small = {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    UNet2DConditionModel.from_config(tiny_unet().config, **small).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """A Stable Diffusion XL pipeline with random weights for images of 16 px."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_clip_config(tokenizer, 16)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip_config(tokenizer, 24)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """A Stable Diffusion 3 pipeline with random weights, images of 16 px."""
    return write_sd3(tmp_path_factory.mktemp("models") / "sd3", tokenizer)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """A FLUX.1-dev pipeline with random weights, images of 16 px."""
    return write_flux(tmp_path_factory.mktemp("models") / "flux", tokenizer)


def _tiny_pipeline(name: str, module: Any, options: dict[str, Any]) -> Any:
    """The fixture with the folder of a pipeline of :mod:`tests.families.tiny`."""

    @pytest.fixture(scope="session", name=f"{name}_folder")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        written: Path = module.write(tmp_path_factory.mktemp("models") / name, **options)
        return written

    return folder


for _name, (_module, _options) in ({name: (module, {}) for name, module in MODULES.items()} | VARIANTS).items():
    globals()[f"{_name}_folder"] = _tiny_pipeline(_name, _module, _options)


@pytest.fixture
def sd_module(sd_folder: Path) -> LoraDiffusion:
    return LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2, lora_alpha=2), base_dtype="float32")


@pytest.fixture
def trainer_options(tmp_path: Path) -> dict[str, Any]:
    """A trainer that writes under the test's folder and is quiet."""
    return {
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "logger": False,
        "max_epochs": -1,
    }


@pytest.fixture(scope="session")
def encode_image() -> Callable[..., bytes]:
    """Encode an image of noise: ``encode_image(width, height, format, **options for Pillow)``."""

    def encode(width: int = 24, height: int = 16, format: str = "JPEG", seed: int = 0, **options: object) -> bytes:  # noqa: A002
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Members], Path]:
    """Write members to a tar in the given order."""

    def write(path: Path, members: Members) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def shards_in(
    encode_image: Callable[..., bytes], write_tar: Callable[[Path, Members], Path]
) -> Callable[..., list[Path]]:
    """Write shards of samples ``0000``, ``0001``, …, each with an image of its own and the caption ``caption 0000``."""

    def make(folder: Path, *counts: int) -> list[Path]:
        paths = []
        number = 0
        for shard, count in enumerate(counts):
            members: dict[str, bytes] = {}
            for _ in range(count):
                members[f"{number:04}.jpg"] = encode_image(seed=number)
                members[f"{number:04}.txt"] = f"caption {number:04}\n".encode()
                number += 1
            paths.append(write_tar(folder / f"shard-{shard:06}.tar", members))
        return paths

    return make


@pytest.fixture
def make_shards(tmp_path: Path, shards_in: Callable[..., list[Path]]) -> Callable[..., list[Path]]:
    """The same in the test's folder."""
    return lambda *counts, folder="shards": shards_in(tmp_path / folder, *counts)


@pytest.fixture(scope="session")
def session_shards(tmp_path_factory: pytest.TempPathFactory, shards_in: Callable[..., list[Path]]) -> Path:
    """A folder of four shards with eight samples each; nobody changes it."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    shards_in(folder, 8, 8, 8, 8)
    return folder


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler.from_pretrained(base_path(), subfolder="scheduler")
