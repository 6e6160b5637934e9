"""Drawing with a base that the GPU's memory does not hold; the CPU stands for the GPU."""

from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from numpy.typing import NDArray
from peft import LoraConfig
from PIL import Image

from lit_lora.errors import UserError
from lit_lora.families import FluxKontext, StableDiffusion
from lit_lora.families.parts import base_model
from lit_lora.prompts import Prompt
from lit_lora.tools.drawing import Drawer, ScaledAdapter
from lit_lora.tools.drawing_base import FamilyBase, PipelineBase
from tests.families.folders import FOLDERS
from tests.helpers import save_adapter

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}
PROMPTS = [Prompt("a star", seed=3), Prompt("a moon", seed=4)]


def drawer_of(folder: Path, **options: Any) -> Drawer:
    given: dict[str, Any] = {"family": None, "dtype": "float32", "device": "cpu", "sizes": [(32, 32)], **options}
    return Drawer(str(folder), **given)


def images_of(drawer: Drawer, prompts: list[Prompt] = PROMPTS) -> NDArray[np.int64]:
    return np.stack([np.asarray(one.image) for one in drawer.draw(prompts, **OPTIONS)]).astype(int)


class Small:
    """A GPU whose memory is not enough for the first uses of a base."""

    def __init__(self, refused: int) -> None:
        self.refused = refused
        self.used: list[Any] = []

    def use(self, what: Any) -> None:
        self.used.append(what)
        if len(self.used) <= self.refused:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB. If reserved but unallocated memory is large try setting more"
            )


def make_small(kind: type[Any], refused: int, monkeypatch: pytest.MonkeyPatch) -> Small:
    gpu, to, generate = Small(refused), kind.to, kind.generate

    def move(self: Any, device: str) -> None:
        if device != "cpu":
            gpu.use(device)
        to(self, device)

    def draw(self: Any, *args: Any, **options: Any) -> Any:
        gpu.use((options.get("batch_size"), options.get("offload_from")))
        return generate(self, *args, **options)

    monkeypatch.setattr(kind, "to", move)
    monkeypatch.setattr(kind, "generate", draw)
    return gpu


def hooked(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Ids of the models that a hook brings to the device from now on."""
    found, bring = set(), CpuOffload.pre_forward

    def pre_forward(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.add(id(module))
        return bring(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    return found


@pytest.mark.parametrize("kind", FOLDERS, ids=lambda kind: kind.__name__)
def test_what_waits_in_host_memory_changes_no_image(
    kind: type[Any], tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(FOLDERS[kind])
    edits = kind is FluxKontext
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    prompts = [replace(one, image=str(tmp_path / "red.png")) for one in PROMPTS] if edits else PROMPTS
    drawer = drawer_of(folder, edits=edits, family=kind.__name__)
    drawer.adapt([])
    expected = images_of(drawer, prompts)
    gpu, cpu = make_small(FamilyBase, 3, monkeypatch), torch.device("cpu")
    computed = hooked(monkeypatch)
    with pytest.warns(UserWarning, match="the GPU's memory does not hold") as told:
        assert np.abs(images_of(drawer, prompts) - expected).max() <= 1
    whats = [str(one.message).partition("hold ")[2].partition(":")[0] for one in told if "GPU" in str(one.message)]
    assert whats == ["a batch of images", "the whole base", "the denoiser"]
    assert gpu.used == [(None, None), (1, None), (1, cpu), (1, cpu)]
    assert drawer.family is not None
    assert {id(base_model(one)) for one in drawer.family.children()} <= computed
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*GPU's memory")
        drawer.adapt([])
        assert np.abs(images_of(drawer, prompts) - expected).max() <= 1


def test_a_batch_that_is_too_large_leaves_the_base_on_the_gpu(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawer = drawer_of(sd_folder)
    drawer.adapt([])
    expected = images_of(drawer)
    gpu = make_small(FamilyBase, 1, monkeypatch)
    with pytest.warns(UserWarning, match="a batch of images: they are drawn one at a time$"):
        assert np.abs(images_of(drawer) - expected).max() <= 1
    images_of(drawer)
    assert gpu.used == [(None, None), (1, None), (1, None)]
    gpu.refused = 4
    with pytest.warns(UserWarning, match="the whole base"):
        images_of(drawer, PROMPTS[:1])


def test_a_base_that_another_one_replaces_is_freed(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawer = drawer_of(sd_folder)
    drawer._saving = "models"
    drawer.adapt([])
    images_of(drawer)
    denoiser = weakref.ref(drawer.family.denoiser)  # type: ignore[union-attr]
    drawer._loaded_with = None
    gc.collect()
    gc.disable()
    try:
        drawer._loaded = None
        assert denoiser() is None
    finally:
        gc.enable()


def test_adapters_over_a_base_whose_blocks_wait(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (2, 3):
        family = StableDiffusion(str(sd_folder))
        family.load(torch.float32)
        family.add_adapter(LoraConfig(r=rank, init_lora_weights=False, target_modules=["to_q", "to_v"]))
        (tmp_path / str(rank)).mkdir()
        save_adapter(family, tmp_path / str(rank))
    chosen = [[ScaledAdapter(str(tmp_path / "2"))], [ScaledAdapter(str(tmp_path / "3"), 0.5)], []]

    def draw_each(drawer: Drawer) -> list[NDArray[np.int64]]:
        drawn = []
        for used in chosen:
            drawer.adapt(used)
            drawn.append(images_of(drawer))
        return drawn

    expected = draw_each(drawer_of(sd_folder))
    assert not any(np.array_equal(one, other) for one, other in pairwise(expected))
    gpu = make_small(FamilyBase, 2, monkeypatch)
    with pytest.warns(UserWarning, match="GPU's memory") as told:
        drawn = draw_each(drawer_of(sd_folder, device="cpu:0"))
    # Smaller batches would not help to move the base to the GPU.
    assert [str(one.message).partition("hold ")[2].partition(":")[0] for one in told] == [
        "the whole base",
        "the denoiser",
    ]
    assert [what for what in gpu.used if isinstance(what, str)] == ["cpu:0"]
    assert all(np.abs(one - other).max() <= 1 for one, other in zip(drawn, expected, strict=True))


@pytest.mark.parametrize(("kind", "tries"), [(FamilyBase, 3), (PipelineBase, 2)])
def test_a_gpu_that_is_too_small_for_all(
    kind: type[Any], tries: int, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = make_small(kind, 99, monkeypatch)
    if kind is PipelineBase:
        monkeypatch.setattr("lit_lora.tools.drawing.family_of_source", lambda source: None)
    drawer = drawer_of(sd_folder, device="cpu:0")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*GPU's memory")
        drawer.adapt([])
        with pytest.raises(
            UserError, match=r"^CUDA out of memory. Tried to allocate 2 GiB. All that can wait .* --device cpu$"
        ):
            images_of(drawer)
    assert len(gpu.used) == tries
