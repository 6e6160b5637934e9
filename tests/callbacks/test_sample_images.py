from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA, ImageWriter, SampleImages
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from lit_lora.sampling import SamplingOptions
from tests.helpers import ImageLogger, loader_of, make_batches, processes


def fit(module: LoraDiffusion, options: dict[str, Any], callbacks: list[Any], steps: int = 4) -> Trainer:
    trainer = Trainer(**options | {"max_steps": steps, "callbacks": callbacks})
    trainer.fit(module, loader_of(make_batches(steps)))
    return trainer


def test_grids_go_to_png_and_tensorboard(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    sampler = SampleImages(["a star", "a heart", "a two"], every_n_steps=2, num_inference_steps=2, columns=2)
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    fit(sd_module, trainer_options | {"logger": logger}, [sampler])
    folder = tmp_path / "run" / "version_0"
    names = sorted(p.name for p in (folder / "samples").iterdir())
    assert names == ["step-000000.png", "step-000002.png", "step-000004.png"], "the last step, once"
    with Image.open(folder / "samples" / "step-000004.png") as grid:
        assert grid.size == (2 * 18 + 2, 2 * 18 + 2)
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [0, 2, 4]


@pytest.mark.parametrize(
    "ending",
    [
        {"max_steps": 3},
        {"max_time": {"milliseconds": 1}},
        {"callbacks": [EarlyStopping("train/loss", patience=1, min_delta=1e9, check_on_train_epoch_end=True)]},
    ],
)
def test_the_end_of_training_is_drawn(
    ending: dict[str, Any], sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever ends it, and in the card of the last adapter."""
    sampler = SampleImages(["a star"], every_n_steps=100, num_inference_steps=1)
    checkpoints = AdapterCheckpoint(tmp_path / "ck", save_last=True)
    options = trainer_options | {"enable_checkpointing": True, "max_steps": 50} | ending
    options["callbacks"] = [sampler, checkpoints, *ending.get("callbacks", [])]
    trainer = Trainer(**options)
    trainer.fit(sd_module, loader_of(make_batches(5)))
    assert 0 < trainer.global_step < 50
    folder = tmp_path / "samples"
    last = f"step-{trainer.global_step:06d}.png"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000.png", last]
    assert f"![samples](samples/{last})" in (tmp_path / "ck" / "last.adapter" / "README.md").read_text()


@pytest.mark.parametrize("averaged", [False, True])
def test_the_latest_grid_is_in_the_model_card(
    averaged: bool, sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """In that of the weights that drew it; the grid before the first step shows the base and is in none."""
    sampler = SampleImages(["a star", "a heart"], every_n_steps=2, num_inference_steps=2, seed=7)
    checkpoints = AdapterCheckpoint(tmp_path / "ck", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = trainer_options | {"enable_checkpointing": True}
    fit(sd_module, options, [sampler, checkpoints, *([AdapterEMA(0.5)] if averaged else [])], steps=3)
    ending = ".ema.adapter" if averaged else ".adapter"
    for step, shown in ((1, None), (2, 2), (3, 3)):
        folders = {ends: tmp_path / "ck" / f"step={step}{ends}" for ends in (".adapter", ".ema.adapter")}
        for ends, folder in folders.items():
            card = (folder / "README.md").read_text() if folder.exists() else ""
            if ends != ending or shown is None:
                assert "## Samples" not in card
                continue
            assert f"![samples](samples/step-{shown:06d}.png)" in card
            assert "- a heart (seed 8)" in card
            assert card.count("## Samples") == len(list((folder / "samples").iterdir())) == 1, "none of an earlier step"
            with Image.open(folder / "samples" / f"step-{shown:06d}.png") as grid:
                assert grid.size[0] > 32


def test_a_second_one_would_replace_the_files_of_the_first(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any]
) -> None:
    with pytest.raises(
        UserError, match=r"would replace each other's samples/step-NNNNNN\.png; give all prompts to one"
    ):
        fit(sd_module, trainer_options, [SampleImages(["a star"]), SampleImages(["a heart"])])


def test_sampling_does_not_disturb_training(sd_module: LoraDiffusion, trainer_options: dict[str, Any]) -> None:
    sampler = SampleImages(["a star"], every_n_steps=1, num_inference_steps=2)
    sd_module.adapter.lora_dropout = 0.5  # type: ignore[attr-defined]
    torch.manual_seed(0)
    fit(sd_module, trainer_options, [sampler])
    with_samples = [p.detach().clone() for p in sd_module.parameters() if p.requires_grad]
    torch.manual_seed(0)
    other = LoraDiffusion(type(sd_module.family)(sd_module.family.pretrained_model_name_or_path), sd_module.adapter)
    other.base_dtype = sd_module.base_dtype
    fit(other, trainer_options, [])
    without = [p for p in other.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(with_samples, without, strict=True))
    assert sd_module.family.denoiser.training


def test_the_averaged_weights_are_used_if_there_are_any(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    sd_module.optimizer = lambda p: torch.optim.SGD(p, lr=10.0)
    sampler = SampleImages(["a star"], every_n_steps=4, num_inference_steps=2)
    drawn: list[np.ndarray[Any, Any]] = []
    original = sd_module.generate

    def generate(*arguments: Any, **options: Any) -> list[Image.Image]:
        images = original(*arguments, **options)
        drawn.append(np.asarray(images[0]))
        return images

    sd_module.generate = generate  # type: ignore[method-assign]
    ema = AdapterEMA(0.999)
    fit(sd_module, trainer_options, [ema, sampler])
    options = sampler.options
    raw = np.asarray(original(["a star"], [0], **options)[0])
    with ema.averaged(sd_module):
        averaged = np.asarray(original(["a star"], [0], **options)[0])
    assert np.array_equal(drawn[-1], averaged)
    assert not np.array_equal(drawn[-1], raw)


def test_a_module_that_cannot_draw_is_refused(trainer_options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"generate\(prompts, seeds, \*\*options\), which BoringModel does not have"):
        Trainer(**trainer_options, callbacks=[SampleImages(["a star"])]).fit(BoringModel())


def test_image_writer(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sd_module.sampling = SamplingOptions(num_inference_steps=2)
    batch = make_batches(1)[0]
    batch["weight"] = torch.tensor([1.0, 0.0])
    batch["key"][0] = "../x"
    writer = ImageWriter(str(tmp_path / "drawn"))
    Trainer(**trainer_options, callbacks=[writer]).predict(sd_module, loader_of([batch]), return_predictions=False)
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["000000-_x.png", "000000-_x.txt"]
    assert (tmp_path / "drawn" / "000000-_x.txt").read_text() == "a red seven on white\n"
    assert capsys.readouterr().out.endswith(f"1 image with captions: {tmp_path / 'drawn'}\n")


def test_images_of_an_earlier_run_are_told(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def predict(*keys: str) -> None:
        batch = {name: entry[: len(keys)] for name, entry in make_batches(1)[0].items()} | {"key": list(keys)}
        writer = ImageWriter(str(tmp_path / "drawn"))
        Trainer(**trainer_options, callbacks=[writer]).predict(sd_module, loader_of([batch]), return_predictions=False)

    sd_module.sampling = SamplingOptions(num_inference_steps=1)
    predict("a", "b")
    predict("a", "b")  # all are replaced
    assert not [one for one in recwarn if "from before this run" in str(one.message)]
    with pytest.warns(
        UserWarning, match=r"drawn also holds 1 images from before this run, such as 000001-b\.png; remove"
    ):
        predict("a")


def test_a_smaller_last_batch_overwrites_no_image(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Batches that do not number their samples, as a plain loader gives them."""
    sd_module.sampling = SamplingOptions(num_inference_steps=1)

    def collate(captions: list[str]) -> dict[str, Any]:
        return {"caption": captions, "pixel_values": torch.zeros(len(captions), 3, 16, 16)}

    loader: Any = DataLoader(["a", "b", "c"], batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    seeds: list[int] = []
    draw = sd_module.generate

    def generate(prompts: list[str], given: list[int], **options: Any) -> list[Image.Image]:
        seeds.extend(given)
        return draw(prompts, given, **options)

    sd_module.generate = generate  # type: ignore[method-assign]
    trainer = Trainer(**trainer_options, callbacks=[ImageWriter(str(tmp_path / "drawn"))])
    for _ in range(2):  # each run counts from 0
        trainer.predict(sd_module, loader, return_predictions=False)
        drawn = sorted(path.name for path in (tmp_path / "drawn").glob("*.png"))
        assert drawn == ["000000-.png", "000001-.png", "000002-.png"]
    assert seeds == [0, 1, 2] * 2  # so the number of an image's file is that of its seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["x"], "every_n_steps": 0}, "every_n_steps=0 is too small; it must be at least 1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SampleImages(**arguments)


@pytest.mark.slow
def test_two_processes_train_and_sample(sd_folder: Path, tmp_path: Path) -> None:
    """Both processes draw a part of the grid, and their collective calls match."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 0, 90)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a star")
    pack_folder(images, tmp_path / "shards")
    processes([Path(__file__).with_name("ddp_samples_script.py"), tmp_path, sd_folder], 2, tmp_path)
    samples = sorted(p.name for p in tmp_path.glob("lightning_logs/version_0/samples/*"))
    assert samples == [f"step-{step:06d}.png" for step in range(5)]
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*step=4.ema.adapter"))


def test_other_loggers_get_the_images_or_say_that_they_show_none(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = SampleImages(["a star"], every_n_steps=2, num_inference_steps=2)
    logger = ImageLogger(tmp_path)
    fit(sd_module, trainer_options | {"logger": [logger, CSVLogger(tmp_path / "csv")]}, [sampler])
    assert logger.images == [("samples", (16, 16), step) for step in (0, 2, 4)]
    [told] = [message for message in caplog.messages if "shows no images" in message]
    assert told == f"CSVLogger shows no images; the samples are in {logger.log_dir}/samples"


def test_a_file_of_prompts_with_sizes_of_their_own(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Each is drawn with its own settings, and the grid has their order."""
    (tmp_path / "prompts.yaml").write_text(
        "- a star\n- {prompt: a heart, width: 32, negative_prompt: a two, seed: 5}\n- a two\n"
    )
    sampler = SampleImages(str(tmp_path / "prompts.yaml"), every_n_steps=2, num_inference_steps=1, height=16, width=16)
    calls: list[tuple[Any, Any, Any, Any]] = []
    original = sd_module.generate

    def generate(prompts: Any, seeds: Any = None, **options: Any) -> list[Image.Image]:
        calls.append((prompts, seeds, options["width"], options.get("negative_prompts")))
        return original(prompts, seeds, **options)

    sd_module.generate = generate  # type: ignore[method-assign]
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    fit(sd_module, trainer_options | {"logger": logger}, [sampler], steps=1)
    drawn = [(["a star", "a two"], [0, 2], 16, None), (["a heart"], [5], 32, ["a two"])]
    assert calls == drawn * 2, "before the first step, and at the end"
    with Image.open(tmp_path / "run" / "version_0" / "samples" / "step-000000.png") as grid:
        black = [grid.getpixel((2 + i * 34 + 4, 10)) == (0, 0, 0) for i in range(3)]
    assert black == [True, False, True]  # the narrow images are centred
    assert "- a heart (negative prompt a two, seed 5, width 32)" in sampler.description
