from __future__ import annotations

import json
import tarfile
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from lit_lora.cli import main
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from lit_lora.option_names import SHORT
from lit_lora.prompts import read_prompts
from lit_lora.tools.train import split_arguments, train_command
from lit_lora.tools.training.request import RECORD, Request, claim
from lit_lora.tools.training.run import train_adapter


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 20 small images without captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (20, 20), (number * 12, 0, 99)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def command(images: Path, sd_folder: Path, tmp_path: Path) -> list[str]:
    """A run of two steps that draws nothing while it trains."""
    options = ["--trigger", "sks dog", "--out", str(tmp_path / "out"), "--trainer.max_steps", "2"]
    memory = ["--device", "cpu", "--device_memory", "100", "--model.base_dtype=float32"]
    return ["train", str(images), "--base", str(sd_folder), *options, *memory]


@pytest.mark.slow
def test_a_folder_becomes_an_adapter_and_the_same_command_resumes(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*command, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "captions  trigger alone" in shown
    assert "steps     2" in shown
    assert "as given" in shown
    assert max(map(len, shown.splitlines())) <= 80 + len(str(tmp_path))
    assert not (out / "lightning_logs").exists()
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 2
    assert config["data"]["init_args"]["val_samples"] == 2

    assert main(command) == 0
    shown = capsys.readouterr()
    assert "20 images" in shown.out
    assert "by an earlier run" in shown.out
    assert "planned" not in shown.out, "the config of the dry run is taken"
    assert "step 0: val/loss" in shown.err
    run = out / "lightning_logs" / "version_0"
    results = json.loads((out / "finished.json").read_text())
    assert results["folder"] == str(run)
    assert {"adapter", "best", "card", "report", "figures", "samples"} <= results.keys()
    assert all((run / path).exists() for name, path in results.items() if name != "folder")
    assert f"--adapter {run / results['best']}" in shown.out
    lines = [*shown.out.splitlines(), *shown.err.replace("\r", "\n").splitlines()]
    assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line] == []
    assert "written:" not in shown.out, "files are listed once, at the end"
    assert str(run / "checkpoints") not in shown.err
    assert "each pass drops" not in shown.err
    assert "--prompts 'sks dog'" in shown.out

    (out / "finished.json").unlink()  # as if it had been killed before its end
    assert main(command) == 0
    assert "resuming from the last checkpoint" in capsys.readouterr().out
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().out
    assert [path.name for path in out.glob("lightning_logs/*")] == ["version_0"]

    (tmp_path / "images" / "7.png").unlink()
    assert main(command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"the images of {tmp_path / 'images'} are not those that {out} was trained on" in told
    assert "name another folder with --out to train on what they are now, or put them back" in told


@pytest.mark.slow
def test_splits_of_a_folder_are_trained_and_validated_on(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, count in (("train", 4), ("validation", 3), ("test", 2)):
        (tmp_path / "set" / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 20), (90 * number, 0, 9)).save(tmp_path / "set" / split / f"{split}{number}.png")
    shown: dict[str, set[str]] = {"training_step": set(), "validation_step": set()}
    for name in shown:

        def recording(self: LoraDiffusion, batch: Any, batch_idx: int, name: str = name, step: Any = None) -> Any:
            shown[name].update(batch["key"])
            return step(self, batch, batch_idx)

        monkeypatch.setattr(LoraDiffusion, name, partialmethod(recording, step=getattr(LoraDiffusion, name)))
    given = ["--base", str(sd_folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--device_memory", "100"]
    short = ["--trigger", "sks", "--trainer.max_steps", "4", "--model.base_dtype=float32"]
    assert main(["train", str(tmp_path / "set"), *given, *short]) == 0
    screen = capsys.readouterr().out
    assert "validate 3 images, " in screen
    assert "images 4 + 3 those of the folder validation are for validation" in " ".join(screen.split())
    assert "test/: is another split than train" in screen
    assert "validation/:" not in screen
    assert {Path(key).name for key in shown["training_step"]} == {f"train{number}" for number in range(4)}
    assert {Path(key).name for key in shown["validation_step"]} == {f"validation{number}" for number in range(3)}
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["data"]["init_args"]["val_samples"] == 0
    kinds = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert "BaseLoss" in kinds
    assert "best checkpoints/best-step=" in " ".join(screen.split())


@pytest.mark.slow
def test_pairs_of_two_folders(
    flux_kontext_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run reads each target with its source; what has no partner is left out and named."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for number in range(1, 22):
        Image.new("RGB", (24, 24), (0, number * 12, 0)).save(sources / f"{number}.bmp")
    given = ["--base", str(flux_kontext_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    given += ["--device_memory", "100", "--captions", "names", "--data.init_args.resolution", "16"]
    command = ["train", str(images), "--sources", str(sources), "--dry_run", *given]
    assert main([*command, "--max_bad", "1"]) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "19 images" in screen
    assert f"0.png: has no source, an image 0.* at the same place in {sources}" in screen
    assert "20.bmp: is a source to which no image belongs" in screen
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    data = config["data"]["init_args"]
    assert data["decoder"]["class_path"] == "lit_lora.datamodules.EditDecoder"
    [draws] = [one for one in config["trainer"]["callbacks"] if one["class_path"].endswith("SampleImages")]
    assert draws["init_args"]["prompts"] == [str(tmp_path / "out" / "prompts" / "prompts.yaml")]
    for prompt in read_prompts(draws["init_args"]["prompts"]):
        assert prompt.image is not None
        with Image.open(prompt.image) as source:
            assert source.getpixel((0, 0)) == (0, int(prompt.prompt) * 12, 0)
    with tarfile.open(tmp_path / "out" / "shards" / "shard-000000.tar") as archive:
        for number in range(1, 20):
            with Image.open(archive.extractfile(f"{number}.source.png") or "") as source:
                assert source.getpixel((0, 0)) == (0, number * 12, 0)


def test_it_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"starts those of --trainer.devices itself"):
        train_adapter(Request("images", "embedded"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--base": "sdxxl"}, "none of the known names: embedded"),
        ({"--trigger": ""}, "give --trigger"),
        ({"--device_memory": "much"}, "device_memory='much' is not a byte size"),
        ({"--device": "abacus"}, "device='abacus' is not known"),
        ({"--device": "RTX 3060", "--trainer.accelerator": "cpu"}, "is a GPU, and trainer.accelerator is cpu"),
        ({"--captions": "words"}, "captions"),
        ({"--out": "."}, "which is no run of train; name another folder with --out"),
        ({"--trainer.max_steps": "many"}, "trainer.max_steps: 'many' is not an int"),
        ({"--trainer.max_steps": "0"}, "trainer.max_steps=0 is too small; it must be at least 1"),
        ({"--stepz": "3"}, "stepz"),
        ({"--sources": "."}, "is trained without source images; take a base such as flux_kontext"),
    ],
)
def test_mistakes_are_one_error(
    changes: dict[str, str],
    message: str,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "holds" / "something").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "holds")
    for option, value in changes.items():
        command = [*command, option, value] if option not in command else command
        command[command.index(option) + 1] = value
    try:
        status = main([*command, "--dry_run"])
    except SystemExit as error:
        status = int(str(error.code))
    shown = capsys.readouterr().err
    assert status == 2
    assert message in shown.replace("\n", " ")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rank", "0", "model.adapter.init_args.r=0 is too small"),
        ("--lr", "fast", "lr='fast' is not a number"),
        ("--rank", "3.5", "r=3.5 is a float; write a whole number of at least 1"),
        ("--rank", "null", "r=None is not a number"),
        ("--trainer.max_stepz", "5", "there is no option --trainer.max_stepz; did you mean --trainer.max_steps?"),
        ("--time", "soon", "trainer.max_time='soon' is no duration; give days, hours, minutes and seconds, such as"),
        ("--model.base_dtype", "float17", "float17"),
        ("--trainer.precision", "bf16-true", "would cast the adapter and its optimizer state too; leave it at 32-true"),
        ("--trainer.accelerator", "tpu", "cannot train with trainer.accelerator='tpu', trainer.devices=1: Requirement"),
        ("--trainer.devices", "0", "this machine cannot train with trainer.devices=0: "),
        ("--trainer.num_nodes", "0", "Leave them out to train on the device that it has, or add --dry_run"),
    ],
)
def test_values_of_the_config_are_looked_at_before_images_are_packed(
    option: str, value: str, message: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main([*command, option, value])
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--repeats", "2"], "has num_repeats of its subsets in place of --repeats: change the file"),
        (["--class_images", "dogs"], "has a subset with is_reg = true in place of --class_images: change the file"),
        (None, "names several sets itself; name it alone"),
    ],
)
def test_a_dataset_toml_has_options_of_its_own(
    more: list[str] | None, message: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dataset.toml"
    file.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = {str(images)!r}\n")
    first, *rest = [str(file), str(images)] if more is None else [str(file), *more]
    assert main(["train", first, *rest, "--base", "embedded", "--dry_run", "--out", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_run_that_stops_early_has_finished(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--dry_run"]) == 0
    path = tmp_path / "out" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    stops = {"monitor": "val/loss", "stopping_threshold": 1e9}
    config["trainer"]["callbacks"].append({"class_path": "EarlyStopping", "init_args": stops})
    path.write_text(yaml.safe_dump(config))
    assert main(command) == 0
    page = (tmp_path / "out" / "lightning_logs" / "version_0" / "report.html").read_text()
    assert "<dd>stopped early</dd>" in page
    assert "early stopping has ended the run: Stopping threshold reached: val/loss = " in page
    checkpoint = torch.load(tmp_path / "out/lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    capsys.readouterr()
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_config_for_another_machine_can_be_written(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What this machine lacks is told before images are packed, and only if it is to train."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: False)
    assert main([*command, "--trainer.accelerator", "gpu"]) == 2
    assert "backend found. Leave them out to train on the device that it has" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "out").exists()
    assert main([*command, "--trainer.accelerator", "gpu", "--dry_run"]) == 0
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["trainer"]["accelerator"] == "gpu"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.adapter.target_modules=[to_qq]", "target_modules: 'to_qq' matches no layer of UNet2DConditionModel"),
        ("--model.optimizer.betas=[0.9,1.5]", "the optimizer refuses a value: Invalid beta parameter at index 1: 1.5"),
        ("--model.parameter_groups=[{pattern: 'x*', lr: 1e-3}]", "x*"),
        ("--model.new_tokens={<a>: 1}", "text encoders are trained, and --cache encodes the captions before that; add"),
    ],
)
def test_options_of_the_model_are_checked_before_images_are_packed(
    option: str, message: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, option]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "shards").exists()


@pytest.mark.parametrize(("error", "told"), [(SystemExit(1), 1), (SIGTERMException(130), 0)])
def test_what_is_kept_is_told_once(
    error: SystemExit,
    told: int,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After a signal the callback Preemption has said where the checkpoint is."""

    def ended(arguments: list[str]) -> None:
        last = tmp_path / "out" / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True)
        last.touch()
        raise error

    monkeypatch.setattr("lit_lora.tools.training.run.fit", ended)
    with pytest.raises(SystemExit):
        main([*command, "--cache", "false"])
    assert capsys.readouterr().out.count("kept     ") == told


def test_a_link_to_itself_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert main(["train", str(tmp_path / "loop"), "--base", "embedded", "--dry_run"]) == 2
    assert "loop does not exist" in capsys.readouterr().err


def test_another_run_is_not_overwritten(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"base": "sdxl"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.json").write_text(json.dumps(record))
    (tmp_path / "out" / "config.yaml").write_text("")
    (tmp_path / "out" / "finished.json").write_text("{}")
    assert main(command) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "holds a run with folder=None, not" in message
    assert "give the same options to resume it, or name another folder with --out" in message
    assert json.loads((tmp_path / "out" / "train.json").read_text()) == record


def test_the_help_has_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    """The command refuses one, since it writes it."""
    with pytest.raises(SystemExit):
        train_command(["--help"])
    shown = capsys.readouterr().out
    assert "--trigger" in shown
    assert "--config" not in shown


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["train"], "FOLDER"),
        (["train", "--base", "embedded"], "FOLDER"),
        (["shards", "pack", "a"], "OUT"),
        (["adapter", "convert", "a"], "OUTPUT"),
    ],
)
def test_an_argument_that_is_missing_is_named(
    arguments: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    command = " ".join(arguments[:2] if arguments[0] in ("shards", "adapter") else arguments[:1])
    assert f"{missing} is missing; lit-lora {command} --help shows all" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "command"),
    [(["train", "--folder", "a"], "lit-lora train FOLDER"), (["prior", "--out", "a"], "lit-lora prior OUT")],
)
def test_an_argument_that_is_given_as_an_option(
    arguments: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    name = arguments[1].removeprefix("--")
    assert capsys.readouterr().err == f"lit-lora: error\n{name} is given without --{name}: {command}\n"


def test_keys_of_the_config_are_told_from_own_options() -> None:
    arguments = ["a", "--base", "sdxl", "--trainer.max_steps", "5", "--dry_run", "--model.optimizer.init_args.lr=1e-4"]
    own, given = split_arguments([*arguments, "--data.init_args.buckets", "null", "--seed_everything=3", "--rank=7"])
    assert own == ["a", "--base", "sdxl", "--dry_run=true"]
    assert given == {
        "trainer.max_steps": 5,
        "model.optimizer.init_args.lr": 1e-4,
        "data.init_args.buckets": None,
        "seed_everything": 3,
        "model.adapter.init_args.r": 7,
    }


def test_options_of_a_class_are_given_with_or_without_init_args() -> None:
    short = [
        "--data.batch_size=3",
        "--model.adapter.path",
        "x",
        "--model.adapter.class_path=FromFile",
        "--data.buckets.divisor=8",
        "--model.optimizer.dict_kwargs.x=1",
        '--model.objective.init_args={"prior": null}',
    ]
    assert split_arguments(["a", *short])[1] == {
        "data.init_args.batch_size": 3,
        "model.adapter.init_args.path": "x",
        "model.adapter.class_path": "FromFile",
        "data.init_args.buckets.divisor": 8,
        "model.optimizer.dict_kwargs.x": 1,
        "model.objective.init_args": {"prior": None},
    }


@pytest.mark.parametrize("text", ["2024-01-01", "[2024-01-01]"])
def test_a_date_stays_text(text: str, tmp_path: Path) -> None:
    """The record of the run is JSON, which has no dates."""
    own, given = split_arguments(["a", "--data.init_args.x", text])
    assert own == ["a"]
    assert given == {"data.init_args.x": text}
    claim(tmp_path, Request("a", given=given))
    assert json.loads((tmp_path / RECORD).read_text())["given"] == given


def test_several_folders_have_several_values() -> None:
    """All that follow, unless no folder has come yet: it may also stand last."""
    own, _ = split_arguments(["a", "b", "--repeats", "3", "0.5", "--sources", "x", "y", "--base", "sdxl"])
    assert own == ['["a", "b"]', "--repeats", "[3, 0.5]", "--sources", '["x", "y"]', "--base", "sdxl"]
    assert split_arguments(["--sources", "x", "a"])[0] == ["--sources", "x", "a"]
    assert split_arguments(["a", "b", "--repeats", "3", "--rank", "4"])[0] == ['["a", "b"]', "--repeats", "3"]
    assert split_arguments(["a", "--repeats", "3", "4"])[0] == ["a", "--repeats", "[3, 4]"]


@pytest.mark.parametrize(
    ("base", "more", "message"),
    [
        ("embedded", ["--repeats", "2", "3"], "repeats has 2 values for 1 set; give one for each of icons"),
        ("flux_kontext", ["--sources", ".", "."], "sources has 2 folders for one folder of targets; give one"),
    ],
)
def test_more_values_than_folders(
    base: str, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "icons").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "icons" / "a.png")
    out = ["--trigger", "sks", "--out", str(tmp_path / "out")]
    assert main(["train", str(tmp_path / "icons"), *more, "--base", base, *out]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_short_names_are_keys_of_the_config() -> None:
    assert split_arguments(["steps"]) == (["steps"], {}), "a folder of this name"
    given = [part for name in SHORT for part in (f"--{name}", "5")]
    assert split_arguments(["a", *given]) == (["a"], dict.fromkeys(SHORT.values(), 5))


@pytest.mark.slow
def test_a_run_without_settings_gives_way_to_another_one(
    command: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images, of which none is held out, then more of them, then other options: nothing has to be removed by hand."""
    command = [*command, "--dry_run"]
    for path in sorted(images.iterdir())[2:]:
        path.rename(tmp_path / path.name)
    assert main(command) == 0
    assert "images 2 + 0 none is held out for validation" in " ".join(capsys.readouterr().out.split())
    for path in tmp_path.glob("*.png"):
        path.rename(images / path.name)
    command[command.index("--device_memory") + 1] = "100 B"
    assert main(command) == 2
    assert "nothing fits into 100 B" in capsys.readouterr().err
    command[command.index("--trigger") + 1] = "other words"
    command[command.index("--device_memory") + 1] = "100"
    assert main(command) == 0
    assert "20 images" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    [draws] = [one for one in config["trainer"]["callbacks"] if one["class_path"].endswith("SampleImages")]
    assert set(draws["init_args"]["prompts"]) == {"other words"}
    (images / "7.png").unlink()
    (images / "8.png").write_bytes(b"damaged")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "18 images" in shown
    assert "1 left out" in shown
    assert "8.png" in shown
    assert "config.earlier.yaml" in shown, "the dry run binds nothing: other images get other settings"
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["data"]["init_args"]["val_samples"] == 1
    assert main(command) == 0
    assert "config.earlier.yaml" not in capsys.readouterr().out, "the same images keep their settings"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "x.yaml"], "--config is no option of train"),
        (["--trainer.max_steps"], "--trainer.max_steps needs one value"),
        (["--trainer.callbacks+=X"], r"--trainer.callbacks\+ needs one value"),
    ],
)
def test_options_that_cannot_be_given(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_arguments(arguments)


@pytest.mark.parametrize(("free", "in_files"), [(10**12, False), (1000, True)])
def test_offloaded_blocks_are_in_files_where_host_memory_is_short(
    free: int,
    in_files: bool,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lit_lora.tools.training.run.is_here", lambda device: True)
    monkeypatch.setattr("lit_lora.tools.training.run.available_memory", lambda: free)
    out, given = (
        tmp_path / "out",
        ["--model.memory.offload_blocks", "true", "--device", "RTX 3060", "--dry_run", "--trigger", "sks"],
    )
    assert main(["train", str(images), "--base", "embedded", "--out", str(out), *given]) == 0
    memory = yaml.safe_load((out / "config.yaml").read_text())["model"]["memory"]
    assert memory["offload_blocks"]
    assert memory.get("offload_folder") == (str(out) if in_files else None)
    screen = " ".join(capsys.readouterr().out.split())
    assert ("blocks in files they take up to" in screen) == ("1.0 kB are free" in screen) == in_files
