"""The examples of the documentation, as a user runs them: files outside the package."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from lit_lora import BadSampleError, FlowMatching, LoraDiffusion, StableDiffusion, UserError
from lit_lora.cli import main
from lit_lora.draws import Draws
from lit_lora.formats import TensorFile
from lit_lora.formats.find import read_adapter
from tests.s3_server import s3_server

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SCHEDULE = {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 100}
LATENTS = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import an example by its name, with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> Any:
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


@pytest.fixture
def run(sd_folder: Path, session_shards: Path, tmp_path: Path) -> Callable[..., int]:
    """Run a command with a small config; further arguments change it."""
    base = {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": str(sd_folder)}}
    shards = {"train_shards": str(session_shards), "resolution": 16, "batch_size": 2, "num_workers": 0}
    checkpoint = {"class_path": "AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path), "save_last": True}}
    config = {
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path),
            "enable_progress_bar": False,
            "callbacks": [checkpoint],
        },
        "model": {
            "family": base,
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2}},
            "base_dtype": "float32",
        },
        "data": {"class_path": "WebDatasetDataModule", "init_args": shards},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return lambda command, *more: main([command, "--config", str(tmp_path / "config.yaml"), *map(str, more)])


def test_classifier_learns(load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the example sets it for good
    assert load("classifier").train(tmp_path, max_steps=100, num_workers=0) > 0.7


def test_injection_learns(load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the example sets it for good
    found = load("injection").train(tmp_path, epochs=3)
    assert found["before"] < 0.5
    assert found["adapter"] > 0.8
    assert found["plain PEFT"] == found["adapter"]


def test_objective_follows_its_formula(load: Callable[[str], Any]) -> None:
    objective = load("my_objective").P2Noise(gamma=0.5)
    objective.prepare(SCHEDULE)
    sample = objective.sample(LATENTS, Draws(0, range(64)))
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 100))[sample.timesteps]
    expected = np.sqrt(kept)[:, None, None, None] * LATENTS.numpy()
    expected += np.sqrt(1 - kept)[:, None, None, None] * sample.target.numpy()
    np.testing.assert_allclose(sample.noisy, expected, atol=1e-5)
    np.testing.assert_allclose(sample.weight, (1 / (1 - kept)) ** -0.5, rtol=1e-4)
    # An error of 3 counts 3 - 1/2 with delta 1.
    torch.testing.assert_close(objective.loss(sample.target + 3, sample), 2.5 * sample.weight)
    objective.eval()
    assert torch.equal(objective.sample(LATENTS, Draws(0, range(64))).weight, torch.ones(64))


def test_objective_refuses_what_it_cannot_train(load: Callable[[str], Any]) -> None:
    kind = load("my_objective").P2Noise
    with pytest.raises(UserError, match="the scheduler is FlowMatchEulerDiscreteScheduler, and P2Noise supports DDPM"):
        kind().prepare({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(UserError, match="prediction_type='v_prediction'"):
        kind().prepare(SCHEDULE | {"prediction_type": "v_prediction"})
    with pytest.raises(UserError, match="gamma=-1 must be at least 0"):
        kind(gamma=-1)
    with pytest.raises(UserError, match="delta=0 must be above 0"):
        kind(delta=0)


def test_objective_trains_and_plans(load: Callable[[str], Any], run: Callable[..., int], tmp_path: Path) -> None:
    load("my_objective")
    chosen = ["--model.objective", "my_objective.P2Noise", "--model.objective.init_args.gamma", "0.5"]
    assert run("fit", *chosen) == 0
    assert (tmp_path / "last.adapter").is_dir()
    assert run("plan", *chosen) == 0


def test_density(load: Callable[[str], Any]) -> None:
    times = load("my_objective").Triangular().times(Draws(0, range(2000)))
    assert 0 <= times.min() < times.max() <= 1
    assert times.var().item() == pytest.approx(1 / 24, rel=0.1)  # half of a uniform value's
    objective = FlowMatching(density=load("my_objective").Triangular())
    objective.prepare({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert objective.sample(LATENTS, Draws(0, range(64))).timesteps.std() < 250


def test_callback_continues_its_file(load: Callable[[str], Any], run: Callable[..., int], tmp_path: Path) -> None:
    load("my_callback")
    added = ["--trainer.callbacks+", "my_callback.LossHistory", "--trainer.callbacks.init_args.every_n_steps", "2"]
    assert run("fit", *added) == 0
    assert run("fit", *added, "--trainer.max_steps", "6", "--ckpt_path", tmp_path / "last.ckpt") == 0
    with (tmp_path / "lightning_logs" / "version_1" / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), int(row["samples"])) for row in rows] == [(2, 2), (4, 2), (6, 2)]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    with pytest.raises(UserError, match="every_n_steps must be at least 1, not 0"):
        load("my_callback").LossHistory(every_n_steps=0)


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.fixture
def array_shards(tmp_path: Path, write_tar: Callable[[Path, Mapping[str, bytes]], Path]) -> Path:
    """A shard with eight arrays of noise and their tags."""
    random = np.random.default_rng(0)
    members = {}
    for number in range(8):
        members[f"{number:04}.npy"] = npy(random.integers(256, size=(20, 24, 3), dtype=np.uint8))
        members[f"{number:04}.json"] = json.dumps({"tags": ["red", str(number)]}).encode()
    return write_tar(tmp_path / "arrays" / "shard-000000.tar", members)


def test_decoder_trains(load: Callable[[str], Any], run: Callable[..., int], array_shards: Path) -> None:
    load("my_data")
    decoder = json.dumps({"class_path": "my_data.ArrayImages", "init_args": {"random_flip": True}})
    shards = ["--data.init_args.train_shards", array_shards, "--data.init_args.val_samples", "2"]
    assert run("fit", "--data.init_args.decoder", decoder, *shards) == 0


def test_decoder_repeats_its_choices(load: Callable[[str], Any]) -> None:
    module = load("my_data")
    array = np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)
    members = {"npy": npy(array), "json": b'{"tags": ["a cat", "red"]}'}
    decoder = module.ArrayImages(random_flip=True).with_seed(3)
    first, again = ([decoder(members, slot, (16, 16), (0, 0))["pixel_values"] for slot in range(8)] for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert len({tuple(pixels.flatten().tolist()) for pixels in first}) == 2  # mirrored and not
    sample = decoder.for_evaluation()(members, 0, (16, 16), (0, 0))
    assert sample["caption"] == "a cat, red"
    assert {name: getattr(value, "shape", None) for name, value in sample.items()} == {
        name: getattr(value, "shape", None) for name, value in decoder.blank((16, 16)).items()
    }


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"npy": npy(np.zeros((4, 4))), "json": b'{"tags": []}'}, "the array is float64"),
        ({"npy": b"no array", "json": b'{"tags": []}'}, "cannot be read"),
        ({"npy": npy(np.zeros((4, 4, 3), np.uint8)), "json": b"{}"}, "cannot be read"),
    ],
)
def test_decoder_says_what_is_wrong(load: Callable[[str], Any], members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        load("my_data").ArrayImages()(members, 0, (16, 16), (0, 0))


def test_datamodule_trains(
    load: Callable[[str], Any], run: Callable[..., int], encode_image: Callable[..., bytes], tmp_path: Path
) -> None:
    module = load("my_data")
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(encode_image(seed=number))
        (folder / f"{number}.txt").write_text("a cat\n")
    data = {"class_path": "my_data.ImageFolder", "init_args": {"folder": str(folder), "resolution": 16}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": data}))
    assert run("fit") == 0
    assert run("fit", "--data.init_args.resolution", "15") == 2  # image_sizes is checked
    with pytest.raises(UserError, match=r"holds no \.jpg"):
        module.ImageFolder(str(tmp_path))


def test_format_gives_back_what_it_has_written(load: Callable[[str], Any], sd_folder: Path, tmp_path: Path) -> None:
    module = load("my_format")
    diffusion = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2), base_dtype="float32")
    diffusion.configure_model()
    diffusion.save_adapter(tmp_path / "my.adapter")
    path = module.convert(tmp_path / "my.adapter")
    content = path.read_bytes()
    file = TensorFile.open(path)
    assert module.SingleFile().recognizes(file)
    read = module.SingleFile().read(file)
    written = read_adapter(path.parent)
    assert read.config == written.config
    assert read.state.keys() == written.state.keys()
    assert all(torch.equal(value, written.state[name]) for name, value in read.state.items())
    module.convert(path.parent)
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="holds no config"):
        module.SingleFile().read(replace(file, metadata={}))


@pytest.mark.slow
def test_shards_in_a_bucket(
    run: Callable[..., int], session_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = shutil.copytree(session_shards, tmp_path / "shards")
    assert main(["shards", "index", str(shards)]) == 0
    with s3_server(monkeypatch, "my-bucket") as client:
        for path in shards.iterdir():
            client.put_object(Bucket="my-bucket", Key=f"shards/{path.name}", Body=path.read_bytes())
        options = {"val_samples": 2, "chunks.count": 2, "chunks.staging.dir": tmp_path / "disk"}
        given = [word for name, value in options.items() for word in (f"--data.init_args.{name}", str(value))]
        assert run("fit", "--config", EXAMPLES / "s3.yaml", *given) == 0
    assert (tmp_path / "last.adapter").is_dir()
    for path in tmp_path.rglob("*"):  # credentials are nowhere
        assert not path.is_file() or b"hunter2" not in path.read_bytes()


@pytest.mark.slow
def test_notebook_learns_and_diffusers_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells in turn, as a kernel runs them; they are plain Python."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the notebook sets it for good
    notebook = json.loads((EXAMPLES / "first_adapter.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    # The same steps as BaseLoss prints.
    assert [line.split(":")[0].split() for line in capsys.readouterr().out.splitlines() if line.startswith("step")] == [
        ["step", number] for number in ("0", "20", "40", "60") * 2
    ]
    assert float(names["rows"][-1]["val/loss"]) < 0.6 * names["base_loss"].base
    drawn = [np.asarray(image, np.float32) for image in [*names["without"], *names["draw_prompts"]()]]
    assert np.abs(drawn[0] - drawn[3]).mean() > 10  # of 255


def test_all_examples_are_listed() -> None:
    listed = re.findall(r"^\| \[`(.*?)`\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted([*listed, "README.md"]) == sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())
