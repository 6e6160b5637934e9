"""The command line: configs parse, runs run, mistakes are one message and exit status 2."""

from __future__ import annotations

import errno
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.machinery import ModuleSpec
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fsspec.registry import _registry
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from lit_lora import __version__
from lit_lora.cli import TOOLS, main
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.files import atomic_folder
from lit_lora.lightning_cli import LitLoraCLI, _claim_version, build_cli
from lit_lora.module import LoraDiffusion
from tests.datamodules.faulty_server import FaultyServer
from tests.warm_python import WarmPython

CONFIGS = sorted(file.name for file in files("lit_lora.configs").iterdir() if file.name.endswith(".yaml"))

OVERLAYS = sorted(file.name for file in files("lit_lora.configs").joinpath("overlays").iterdir())


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(10):
        Image.new("RGB", (20, 18), (20 * i, 90, 200)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"a blue star {i}")
    pack_folder(images, tmp_path / "shards", samples_per_shard=5)
    return tmp_path / "shards"


@pytest.fixture
def config(tmp_path: Path, shards: Path, sd_folder: Path) -> Callable[..., Path]:
    """Writes a small config; dotted keys change it."""

    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "seed_everything": 0,
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 4,
                "max_epochs": -1,
                "default_root_dir": str(tmp_path / "run"),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "callbacks": [
                    {
                        "class_path": "AdapterCheckpoint",
                        "init_args": {"every_n_train_steps": 2, "save_last": "link", "dirpath": str(tmp_path / "ck")},
                    }
                ],
            },
            "model": {
                "family": {
                    "class_path": "StableDiffusion",
                    "init_args": {"pretrained_model_name_or_path": str(sd_folder)},
                },
                "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2, "lora_alpha": 2}},
                "base_dtype": "float32",
                "sampling": {"num_inference_steps": 2},
            },
            "data": {
                "class_path": "WebDatasetDataModule",
                "init_args": {
                    "train_shards": str(shards),
                    "val_samples": 2,
                    "batch_size": 2,
                    "resolution": 16,
                    "num_workers": 0,
                },
            },
        }
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            place = values
            for parent in parents:
                place = place[parent]
            place[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hides a library, as if it were not installed."""

    def hide(library: str) -> None:
        class Finder:
            def __init__(self, finder: Any) -> None:
                self.finder = finder

            def find_spec(self, name: str, *arguments: Any) -> ModuleSpec | None:
                return None if name.split(".")[0] == library else self.finder.find_spec(name, *arguments)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.finder, name)

        for name in [name for name in sys.modules if name.split(".")[0] == library]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Finder(finder) for finder in sys.meta_path])

    return hide


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must exit with 2; returns its error message."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    message = capsys.readouterr().err
    assert status == 2, message
    assert "Traceback" not in message
    assert "usage:" not in message
    assert message.count("error\n") == 1
    return message


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_parses_and_builds_and_names_its_command(name: str) -> None:
    source = files("lit_lora.configs") / name
    assert source.read_text().startswith("# lit-lora ")
    cli: LitLoraCLI = build_cli(["fit", "--config", str(source), "--trainer.accelerator", "cpu"], run=False)
    assert isinstance(cli.model, LoraDiffusion)
    assert cli.trainer.max_steps > 0


def test_a_schedule_free_optimizer_needs_no_callback_in_the_config(config: Callable[..., Path]) -> None:
    pytest.importorskip("schedulefree")
    optimizer = {"class_path": "schedulefree.AdamWScheduleFree", "init_args": {"lr": 1e-3}}
    assert main(["fit", "--config", str(config(**{"model.optimizer": optimizer}))]) == 0


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], False),
        (["--trainer.enable_model_summary", "true"], True),
        (["--trainer.enable_progress_bar", "false"], False),
        (["--trainer.callbacks+", "ModelSummary"], True),
        (["--trainer.callbacks+", "TQDMProgressBar"], True),
    ],
)
def test_lightnings_table_of_layers_is_shown_where_nothing_else_tells_what_is_trained(
    options: list[str], shown: bool, tmp_path: Path
) -> None:
    arguments = ["fit", "--config", "configs/demo.yaml", "--trainer.accelerator", "cpu", *options]
    cli: LitLoraCLI = build_cli([*arguments, "--trainer.default_root_dir", str(tmp_path)], run=False)
    cli.before_fit()
    assert any(isinstance(callback, ModelSummary) for callback in cli.trainer.callbacks) == shown  # type: ignore[attr-defined]


def test_null_turns_off_an_option_within_an_option() -> None:
    data = ["--data.init_args.train_shards", "nowhere"]
    given = ["--data.init_args.chunks", "{count: 2, staging: {dir: d}}", "--data.init_args.decoder.mask", "alpha"]
    null = ["--data.init_args.chunks.staging", "null", "--data.init_args.decoder.mask=null"]
    cli: LitLoraCLI = build_cli(["fit", "--config", "configs/demo.yaml", *data, *given, *null], run=False)
    assert (cli.datamodule.chunks.count, cli.datamodule.chunks.staging, cli.datamodule.decoder.mask) == (2, None, None)


@pytest.mark.parametrize("prefix", ["None", "a=None"])
def test_a_text_is_not_taken_for_null(prefix: str) -> None:
    data = ["--data.init_args.train_shards", "nowhere", "--data.init_args.decoder.captions.prefix", prefix]
    cli: LitLoraCLI = build_cli(["fit", "--config", "configs/demo.yaml", *data], run=False)
    assert cli.datamodule.decoder.captions.prefix == prefix


@pytest.mark.filterwarnings("ignore:.*are left out, since a later list replaces it")
def test_a_callback_may_stand_alone(tmp_path: Path) -> None:
    one = ["--trainer.callbacks", "LearningRateMonitor", "--trainer.default_root_dir", str(tmp_path)]
    cli: LitLoraCLI = build_cli(["fit", "--config", "configs/demo.yaml", *one], run=False)
    cli.before_fit()
    kinds = {type(callback).__name__ for callback in cli.trainer.callbacks}  # type: ignore[attr-defined]
    assert {"LearningRateMonitor", "AdapterCheckpoint"} <= kinds, "the default one saves, since no other does"


def test_a_config_may_have_a_progress_bar_of_its_own(tmp_path: Path) -> None:
    own = ["--trainer.callbacks+=StepProgress", "--trainer.callbacks.line_seconds=5"]
    own += ["--trainer.default_root_dir", str(tmp_path)]
    cli: LitLoraCLI = build_cli(["fit", "--config", "configs/demo.yaml", *own], run=False)
    cli.before_fit()
    found = [one for one in cli.trainer.callbacks if isinstance(one, ProgressBar)]  # type: ignore[attr-defined]
    assert [one.line_seconds for one in found] == [5]  # type: ignore[attr-defined]


# Configs have the same keys, and building one takes seconds: each is under one overlay, and each overlay over one at least.
# Not every family's text encoders can be trained.
FOR_ALL = [overlay for overlay in OVERLAYS if overlay != "text_encoders.yaml"]


@pytest.mark.parametrize(
    ("name", "overlay"),
    [
        ("sdxl.yaml", "text_encoders.yaml"),
        *((name, FOR_ALL[number % len(FOR_ALL)]) for number, name in enumerate(CONFIGS)),
    ],
)
def test_every_overlay_goes_over_a_config(name: str, overlay: str) -> None:
    source = files("lit_lora.configs").joinpath("overlays", overlay)
    text = source.read_text()
    assert text.startswith("# lit-lora fit --config configs/")
    assert re.search("Planned|Measured|Tested", text), "a comment says how the overlay was checked"
    configs = ["--config", f"configs/{name}", "--config", f"configs/overlays/{overlay}"]
    cli: LitLoraCLI = build_cli(["fit", *configs, "--trainer.accelerator", "cpu", "--trainer.devices", "1"], run=False)
    over: dict[str, Any] = yaml.safe_load(text)
    changed = over.get("model", {})
    if "quantization" in changed:
        assert type(cli.model.quantization).__name__ == changed["quantization"]["class_path"].rpartition(".")[2]
    for key, value in changed.get("memory", {}).items():
        option = getattr(cli.model.memory, key)
        if isinstance(value, dict):
            assert type(option).__name__ == value["class_path"].rpartition(".")[2]
        else:
            assert option == value
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    assert {"AdapterCheckpoint", "SampleImages", "ImageWriter"} <= set(kinds)
    assert kinds.count("MemoryLimit") == overlay.endswith("gb.yaml")
    if "data" in over:
        assert cli.datamodule.batch_size == over["data"]["init_args"]["batch_size"]
    if "strategy" in over.get("trainer", {}):
        named = over["trainer"]["strategy"]
        name = named if isinstance(named, str) else named["class_path"].rpartition(".")[2]
        assert type(cli.trainer.strategy).__name__ in (name, "DDPStrategy" if name == "ddp" else name)
    assert cli.datamodule.resolution > 0
    assert len(cli.trainer.callbacks) > 3, "those of the config"


@pytest.mark.parametrize("strategy", ["lightning.pytorch.strategies.DDPStrategy", "lit_lora.distributed.LitLoraFSDP"])
def test_how_long_processes_wait_for_each_other(strategy: str) -> None:
    chosen = [f"--trainer.strategy={strategy}", "--trainer.strategy.init_args.timeout=0:10:00"]
    cli = build_cli(["fit", "--config", "configs/demo.yaml", "--trainer.accelerator=cpu", *chosen], run=False)
    waits: Any = cli.trainer.strategy
    assert waits._timeout == timedelta(minutes=10)


def test_a_shipped_config_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli = build_cli(["fit", "--config", "configs/sdxl.yaml", "--trainer.accelerator=cpu"], run=False)
    assert type(cli.model.family).__name__ == "StableDiffusionXL"


def test_config_with_an_equals_sign(config: Callable[..., Path]) -> None:
    cli = build_cli(["fit", f"--config={config()}", "--data.init_args.batch_size=3"], run=False)
    assert cli.datamodule.batch_size == 3


def test_fit_validate_test_predict(
    config: Callable[..., Path], tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    assert main(["fit", "--config", str(path)]) == 0
    last = tmp_path / "ck" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    capsys.readouterr()
    assert main(["validate", "--config", str(path), "--ckpt_path", str(last)]) == 0
    assert re.search(r"^val/loss +\d\.\d+\nval/loss_q\d +\d\.\d+$", capsys.readouterr().out, re.MULTILINE)
    test_shards = ["--data.init_args.test_shards", str(shards)]
    assert main(["test", "--config", str(path), "--ckpt_path", str(last), *test_shards]) == 0
    out = tmp_path / "drawn"
    writer = ["--trainer.callbacks+=ImageWriter", f"--trainer.callbacks.output_dir={out}"]
    predict = ["predict", "--config", str(path), "--ckpt_path", str(last), "--return_predictions", "false", *writer]
    assert main(predict) == 0
    assert len(list(out.glob("*.png"))) == 2


def test_secrets_in_urls_stay_out_of_what_a_run_writes(
    config: Callable[..., Path],
    tmp_path: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = FaultyServer(shards)
    try:
        urls = [server.url.replace("//", "//user:hunter2@") + f"/shard-00000{n}.tar?token=hunter2" for n in range(2)]
        staging = {"dir": str(tmp_path / "stage")}
        path = config(data__init_args__train_shards=urls, data__init_args__chunks={"staging": staging})
        caplog.set_level(0)
        assert main(["fit", "--config", str(path)]) == 0
        assert any("token=hunter2" in request.path for request in server.requests)
        server.fault = 403
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
        assert main(["fit", "--config", str(path)]) == 2
    finally:
        server.close()

    printed = capfd.readouterr()
    assert "HTTP status 403" in printed.err
    path.unlink()
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert (tmp_path / "run" / "lightning_logs" / "version_0" / "config.yaml") in written
    assert not [file for file in written if b"hunter2" in file.read_bytes() or "hunter2" in file.name]
    assert "hunter2" not in printed.out + printed.err + caplog.text


@pytest.mark.parametrize("base", ["Int8", "FP8", "NF4"])
def test_fit_over_a_quantised_base(base: str, config: Callable[..., Path], tmp_path: Path) -> None:
    assert (
        main(
            [
                "fit",
                "--config",
                str(config()),
                "--model.quantization",
                base,
                "--model.memory.gradient_checkpointing",
                "true",
            ]
        )
        == 0
    )
    assert (tmp_path / "ck" / "last.adapter" / "pytorch_lora_weights.safetensors").is_file()
    saved = yaml.safe_load((tmp_path / "run" / "lightning_logs" / "version_0" / "config.yaml").read_text())
    assert saved["model"]["quantization"]["class_path"] == f"lit_lora.{base}"


def test_the_command_line_wins_over_the_checkpoint(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config()
    assert main(["fit", "--config", str(path)]) == 0
    last = str(tmp_path / "ck" / "last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    torch.save(checkpoint | {"hyper_parameters": {"seed": 3}}, last)
    resume = ["fit", "--config", str(path), "--ckpt_path", last, "--trainer.max_steps", "6", "--model.seed", "7"]
    with pytest.warns(UserWarning, match="model.seed 0 in the checkpoint, 7 here"):
        assert main(resume) == 0
    saved = yaml.safe_load((tmp_path / "run" / "lightning_logs" / "version_1" / "config.yaml").read_text())
    assert saved["model"]["seed"] == 7
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_samples_from_a_trained_adapter(config: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["fit", "--config", str(config())]) == 0
    adapter = str(tmp_path / "ck" / "last.adapter")
    out = tmp_path / "out"
    arguments = ["sample", "--adapter", adapter, "--prompts", "a blue star", "--count", "3", "--steps", "2"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert main([*arguments, "--out", str(tmp_path / "grid.png"), "--columns", "2"]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * 18 + 2, 2 * 18 + 2)


def test_fit_goes_on_with_a_saved_adapter(config: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["fit", "--config", str(config())]) == 0
    file = tmp_path / "ck" / "last.adapter" / "pytorch_lora_weights.safetensors"
    adapter = {"class_path": "FromFile", "init_args": {"path": str(file)}}
    written = {
        "class_path": "AdapterCheckpoint",
        "init_args": {"dirpath": str(tmp_path / "second"), "formats": ["kohya"]},
    }
    written["init_args"] |= {"save_last": True, "info": {"title": "Stars", "trigger_words": ["a blue star"]}}
    path = config(model__adapter=adapter, trainer__callbacks=[written])
    assert main(["fit", "--config", str(path)]) == 0
    assert (tmp_path / "second" / "last.adapter" / "kohya.safetensors").is_file()
    assert "trigger words | `a blue star" in (tmp_path / "second" / "last.adapter" / "README.md").read_text()


def test_fit_trains_over_another_adapter(config: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["fit", "--config", str(config())]) == 0
    file = tmp_path / "ck" / "last.adapter" / "pytorch_lora_weights.safetensors"
    written = {"class_path": "AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path / "over"), "save_last": True}}
    over = [{"path": str(file), "weight": 0.5}]
    path = config(model__base_adapters=over, trainer__callbacks=[written])
    assert main(["fit", "--config", str(path)]) == 0
    card = (tmp_path / "over" / "last.adapter" / "README.md").read_text()
    assert "| trained over | `pytorch_lora_weights.safetensors` with weight 0.5 |" in card
    assert main(["plan", "--config", str(path)]) == 0


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "demo", "sample", "cache", "shards"):
        assert f"\n  {command} " in text
    assert max(map(len, text.splitlines())) <= 80
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lit-lora {__version__}\n"


def test_the_package_runs_as_the_command_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit_lora", "fitt"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lit_lora", run_name="__main__")
    assert ended.value.code == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "--out", ""], "--out"),
        (["sample", "--prompts", "a", "--out="], "--out"),
        (["plan", "--config", "configs/sd15.yaml", "--json", ""], "--json"),
        (["report", ""], "an argument"),
        (["shards", "pack", "images", ""], "an argument"),
    ],
)
def test_an_empty_path_is_not_the_working_folder(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert f"{named} is empty, as a variable of the shell may be" in capsys.readouterr().err


def test_a_text_may_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    for texts in (["--prompts", "", "--negative_prompt="], ["--prompts", "1+1="], ["--negative", ""]):
        assert main(["sample", *texts]) == 2, "there is no adapter"
        assert "is empty" not in capsys.readouterr().err


@pytest.mark.parametrize("given", ["nothing.yaml", "/tmp"])
def test_a_config_of_a_tool_that_is_no_file(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sample", "--config", given])
    assert ended.value.code == 2
    assert f"{given} is no file; give the path of a YAML file" in capsys.readouterr().err


def test_a_refused_input_leaves_no_folder_for_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "convert", str(tmp_path / "nothing"), str(tmp_path / "new" / "deep" / "x")]) == 2
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--base", "nowhere", "--prompts", "a", "--out", "/proc/x.png"],
        ["adapter", "convert", "ADAPTER", "/proc/x"],
        ["adapter", "merge", "ADAPTER", "/proc/x", "--into", "nowhere"],
        ["adapter", "resize", "ADAPTER", "/proc/x", "--rank", "2"],
        ["adapter", "extract", "nowhere", "elsewhere", "/proc/x", "--rank", "2"],
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_work(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "the folder /proc is not writable; name another folder" in capsys.readouterr().err


def test_help_of_a_tool_begins_with_its_own_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", "--help"]) == 0
    usage, description, *sections = capsys.readouterr().out.split("\n\n")
    assert usage == "usage: lit-lora plan --config FILE [options]"
    assert description.startswith("Print the plan of a run")
    assert sections[1].startswith("Options of lit-lora plan:")
    assert not any("--ckpt_path" in section for section in sections)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["sample", "--scale", "0.5"], "there is no option --scale; did you mean --scales?"),
        (["shards"], "one of {pack,index,check,info}, but it was not provided; lit-lora shards --help shows all"),
        (["adapter", "export", "a"], "invalid choice: 'export' (choose from 'info', 'check', "),
        (["adapter", "export", "a"], "'push'); lit-lora adapter --help shows all arguments"),
        (["demo", "--stepz", "3"], "there is no option --stepz; did you mean --steps?"),
        (["demo", "--zzzz", "3"], "there is no option --zzzz; lit-lora demo --help shows all arguments"),
    ],
)
def test_arguments_that_a_tool_does_not_have(command: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in failure(capsys, *command)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'fti'; did you mean fit? lit-lora --help lists all commands" in failure(capsys, "fti")
    assert "unknown command 'xyz'; lit-lora --help" in failure(capsys, "xyz")
    assert "unknown command 'pack'; did you mean shards pack?" in failure(capsys, "pack", "images", "shards")
    assert "unknown command 'check'; did you mean shards check or adapter check?" in failure(capsys, "check")


class TestMistakes:
    """Each is one clear message and leaves nothing behind."""

    def test_unknown_key(self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        assert "caption_dropuot" in failure(capsys, "fit", "--config", config(model__caption_dropuot=0.1))

    def test_wrong_type(self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        assert "caption_dropout" in failure(capsys, "fit", "--config", config(model__caption_dropout="much"))

    def test_value_out_of_range(self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        assert "caption_dropout" in failure(capsys, "fit", "--config", config(model__caption_dropout=2.0))

    def test_no_such_storage(self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        message = failure(capsys, "fit", "--config", config(), "--model.quantization", "nf4")
        assert message.endswith("quantizations are Int8, W8A8, FP8, NF4 and Dense\n")
        assert "block_size=63 is not possible; it must be an even number" in failure(
            capsys, "fit", "--config", config(), "--model.quantization", "NF4", "--model.quantization.block_size", 63
        )

    @pytest.mark.parametrize(("library", "extra"), [("bitsandbytes", "quant"), ("torchao", "torchao")])
    def test_eight_bit_optimizer_without_its_library(
        self,
        library: str,
        extra: str,
        config: Callable[..., Path],
        capsys: pytest.CaptureFixture[str],
        hide: Callable[[str], None],
    ) -> None:
        hide(library)
        optimizer = {"class_path": f"{library}.optim.AdamW8bit", "init_args": {"lr": 1e-3}}
        message = failure(capsys, "fit", "--config", config(model__optimizer=optimizer))
        assert message.endswith(f'pip install "lit_lora[{extra}]", or use torch.optim.AdamW\n')

    @pytest.mark.parametrize(
        ("library", "extra", "arguments"),
        [
            ("deepspeed", "deepspeed", ["fit", "--trainer.strategy", "lit_lora_deepspeed_stage_2"]),
            ("s3fs", "s3", ["fit", "--data.init_args.train_shards", "s3://bucket/shards"]),
            ("pyarrow", "parquet", ["shards", "pack", "images.parquet", "out"]),
            ("sklearn", "demo", ["demo"]),
        ],
    )
    def test_a_missing_package_is_named_with_its_extra(
        self,
        library: str,
        extra: str,
        arguments: list[str],
        config: Callable[..., Path],
        capsys: pytest.CaptureFixture[str],
        hide: Callable[[str], None],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(_registry, "s3", raising=False)
        Path("images.parquet").touch()
        hide(library)
        if arguments[0] == "fit":
            arguments = ["fit", "--config", str(config()), *arguments[1:]]
        message = failure(capsys, *arguments)
        assert message.startswith("lit-lora: error\n")
        assert f'pip install "lit_lora[{extra}]"' in message
        assert len(message.splitlines()) == 2

    def test_a_wrong_value_of_the_data_is_one_sentence(
        self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = config(data__init_args__train_shards="https://user:hunter2@example.org/x?token=hunter2")
        for option, message in {
            "batch_size=0": "batch_size=0 is too small; it must be at least 1",
            "decoder.captions.dropout=2": "dropout=2.0 is not a probability; it must be in [0, 1]",
            "chunks.count=0": "chunks.count=0 is too small; it must be at least 1",
            "buckets.divisor=7": "resolution=16 is not a multiple of buckets.divisor=7; choose 14 or another divisor",
            'chunks={"staging": {"dir": "x", "budget": "9XB"}}': (
                "chunks.staging.budget='9XB' is not a byte size; write for example 200GB, 1.5TiB or 200000000000"
            ),
        }.items():
            error = failure(capsys, "fit", "--config", path, f"--data.init_args.{option}")
            assert error == f"lit-lora: error\n{message}\n"

    def test_shell_commands_are_refused(self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        path = config(data__init_args__train_shards="pipe:touch hunter2")
        error = failure(capsys, "fit", "--config", path)
        assert "pipe: runs shell commands and is refused; only" in error
        assert "hunter2" not in error

    def test_full_disk(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "images").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.png")
        (tmp_path / "images" / "a.txt").write_text("a")
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/plan.json")
        monkeypatch.setattr("lit_lora.files.sync", lambda path: (_ for _ in ()).throw(full))
        error = failure(capsys, "shards", "pack", tmp_path / "images", tmp_path / "out")
        assert "cannot write out/plan.json: No space left on device; free some space" in error

    def test_no_such_config(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "nowhere.yaml" in failure(capsys, "fit", "--config", "nowhere.yaml")

    def test_no_such_shard(self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        path = config(data__init_args__train_shards="nowhere/shard-{0..2}.tar")
        assert "nowhere/shard-0.tar" in failure(capsys, "fit", "--config", path)

    def test_empty_tar(self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "empty.tar").write_bytes(bytes(10240))
        path = config(data__init_args__train_shards=str(tmp_path / "empty.tar"))
        assert "holds no samples" in failure(capsys, "fit", "--config", path)

    def test_targets_that_match_nothing(
        self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        path = config(model__adapter__init_args={"target_modules": ["q_proj"]})
        message = failure(capsys, "fit", "--config", path)
        assert "q_proj" in message
        assert "to_q" in message
        assert not list(tmp_path.rglob("*.ckpt"))

    def test_base_without_a_unet(
        self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "base" / "vae").mkdir(parents=True)
        path = config(model__family__init_args__pretrained_model_name_or_path=str(tmp_path / "base"))
        assert "has no folder" in failure(capsys, "fit", "--config", path)

    def test_checkpoint_of_another_adapter(
        self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert main(["fit", "--config", str(config())]) == 0
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "ck").iterdir()}
        path = config(model__adapter__init_args={"r": 4, "lora_alpha": 4})
        message = failure(capsys, "fit", "--config", path, "--ckpt_path", tmp_path / "ck" / "last.ckpt")
        assert "the checkpoint holds another adapter" in message
        assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "ck").iterdir()}

    def test_no_such_checkpoint(self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        assert "x.ckpt does not exist" in failure(capsys, "fit", "--config", config(), "--ckpt_path", "x.ckpt")

    def test_something_that_is_no_checkpoint(
        self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "x.ckpt").write_text("hello")
        assert "x.ckpt" in failure(capsys, "fit", "--config", config(), "--ckpt_path", tmp_path / "x.ckpt")

    def test_output_folder_not_writable(
        self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        path = config(trainer__default_root_dir=str(tmp_path / "file" / "below"))
        assert "cannot create the folder" in failure(capsys, "fit", "--config", path)

    def test_peft_config_that_contradicts_itself(
        self, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = config(model__adapter__init_args={"layers_to_transform": [1], "target_modules": "x.*"})
        assert "layers_to_transform" in failure(capsys, "fit", "--config", path)

    def test_sample(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "give --prompts" in failure(capsys, "sample", "--base", "embedded")
        assert "give --base" in failure(capsys, "sample", "--prompts", "x")
        assert "is not an adapter folder" in failure(capsys, "sample", "--prompts", "x", "--adapter", tmp_path)
        assert "cannot load the base" in failure(capsys, "sample", "--prompts", "x", "--base", tmp_path)

    def test_demo(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert "cannot create the folder" in failure(capsys, "demo", "--out", tmp_path / "file" / "x")
        assert "must be at least 1" in failure(capsys, "demo", "--out", tmp_path, "--steps", "0")


@pytest.mark.slow
def test_an_error_in_a_worker_is_one_message_in_a_process_of_its_own(
    config: Callable[..., Path], shards: Path, tmp_path: Path
) -> None:
    """An image that does not decode, met by a loader worker: exit status 2 and the sample's name."""
    for shard in shards.glob("*.tar"):
        data = bytearray(shard.read_bytes())
        for start in range(len(data)):
            if data[start : start + 4] == b"IDAT":
                data[start + 4 : start + 12] = b"\xff" * 8
        shard.write_bytes(data)
    path = config(data__init_args__num_workers=1)
    command = ["-m", "lit_lora.cli", "fit", "--config", str(path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    status = WarmPython(command, environment, errors=tmp_path / "errors").wait()
    errors = (tmp_path / "errors").read_text()
    assert status == 2, errors[-3000:]
    assert "Traceback" not in errors
    assert "cannot be decoded" in errors


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["train", "images"], "lit-lora: interrupted; the same command goes on\n"),
        (["shards", "pack", "a", "b"], "lit-lora: interrupted; the same command goes on\n"),
        (["shards", "info", "a"], "lit-lora: interrupted\n"),
        (["sample"], "lit-lora: interrupted\n"),
    ],
)
def test_an_interrupted_command_says_whether_it_goes_on(
    command: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_lora.cli._call", interrupted)
    assert main(command) == 130
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("fit", "lit-lora: interrupted; resume from the last saved checkpoint with --ckpt_path last\n"),
        ("train", "lit-lora: interrupted; the same command goes on\n"),
        ("predict", "lit-lora: interrupted\n"),
    ],
)
def test_a_run_that_lightning_ends_after_ctrl_c_says_how_it_goes_on(
    command: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended_by_lightning(arguments: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr("lit_lora.cli._run", ended_by_lightning)
    assert main([command]) == 130
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["train", "images"], "lit-lora: terminated; the same command goes on\n"),
        (["adapter", "merge", "a", "b"], "lit-lora: terminated\n"),
    ],
)
def test_sigterm_ends_a_tool_as_ctrl_c_does(
    command: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing half-written left, also if the signal comes twice; the caller gets its handler back."""

    def writing(arguments: list[str]) -> None:
        with atomic_folder(tmp_path / "out", marker="x"):
            try:
                signal.raise_signal(signal.SIGTERM)
                raise AssertionError("not reached")
            finally:
                signal.raise_signal(signal.SIGTERM)  # as SLURM and torchrun send it twice

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(TOOLS, command[0], writing)
    assert main(command) == 143
    assert capsys.readouterr().err == told
    assert [*tmp_path.iterdir()] == []
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_interrupted_training_says_how_to_go_on(config: Callable[..., Path], tmp_path: Path) -> None:
    command = ["-m", "lit_lora.cli", "fit", "--config", str(config()), "--trainer.max_steps=100000"]
    process = WarmPython(command, os.environ, errors=tmp_path / "errors")
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "ck" / "last.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    finally:
        process.kill()
    error = (tmp_path / "errors").read_text()
    last = tmp_path / "ck" / "last.ckpt"
    found = re.search(r"stopped by Ctrl-C at step (\d+); saved (.*); resume with --ckpt_path last\n$", error)
    assert found
    assert found[2] == str(last)
    assert torch.load(last, weights_only=True)["global_step"] == int(found[1])
    assert "Traceback" not in error


def test_runs_that_start_at_the_same_time_have_folders_of_their_own(tmp_path: Path) -> None:
    loggers = [
        TensorBoardLogger(tmp_path),
        TensorBoardLogger(tmp_path),
        CSVLogger(tmp_path),
        CSVLogger(tmp_path, version=1),
    ]
    for logger in loggers:  # before any of them has written
        _claim_version(logger)
    assert [logger.version for logger in loggers] == [0, 1, 2, 1]


@pytest.mark.parametrize("required", ["true", "false"])
def test_last_is_found_and_nothing_is_said(
    required: str, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    assert main(["fit", "--config", str(path)]) == 0
    resume = ["--trainer.max_steps", "6", "--ckpt_path", "last", "--must_resume", required]
    assert main(["fit", "--config", str(path), *resume]) == 0
    assert torch.load(tmp_path / "ck" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert "ckpt_path=last" not in capsys.readouterr().err


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("required", [False, True])
def test_no_last_checkpoint_is_said_or_refused(
    required: bool, dangling: bool, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ck").mkdir()
    found = f"there is no checkpoint to resume from in {tmp_path / 'ck'}"
    if dangling:
        (tmp_path / "ck" / "last.ckpt").symlink_to("step=2.ckpt")
        found = f"{tmp_path / 'ck' / 'last.ckpt'} points to step=2.ckpt, which is gone"
    resume = ["--ckpt_path", "last", "--must_resume", str(required).lower()]
    assert main(["fit", "--config", str(config()), *resume]) == (2 if required else 0)
    end = "name a checkpoint, or set must_resume to false" if required else "training starts from the beginning"
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count(f"ckpt_path=last: {found}; {end}") == 1
    assert (tmp_path / "ck" / "last.adapter").exists() != required


def test_a_last_checkpoint_that_is_gone_is_named_where_it_was(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "run" / "lightning_logs" / "version_3" / "checkpoints"
    earlier.mkdir(parents=True)
    saving = [{"class_path": "AdapterCheckpoint"}]
    path = config(trainer__callbacks=saving)
    arguments = ["fit", "--config", str(path), "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir"]
    resume = [str(tmp_path / "run"), "--ckpt_path", "last", "--must_resume", "true"]
    assert main([*arguments, *resume]) == 2
    searched = tmp_path / "run" / "lightning_logs" / "version_*" / "checkpoints"
    assert f"no checkpoint to resume from in {searched}; name" in " ".join(capsys.readouterr().err.split())
    (earlier / "last.ckpt").symlink_to("step=2.ckpt")
    assert main([*arguments, *resume]) == 2
    assert f"{earlier / 'last.ckpt'} points to step=2.ckpt, which is gone; name" in " ".join(
        capsys.readouterr().err.split()
    )


def test_must_resume_needs_a_checkpoint(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(config()), "--must_resume", "true"]) == 2
    assert "must_resume is true, and no ckpt_path is given; set ckpt_path to last" in capsys.readouterr().err


def test_adapters_are_saved_without_a_callback(config: Callable[..., Path], tmp_path: Path) -> None:
    """Lightning's own callback would save the whole base, no adapter, and not the last step."""
    path = config(trainer__callbacks=None, trainer__logger=False, trainer__default_root_dir=str(tmp_path / "run"))
    assert main(["fit", "--config", str(path)]) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert last.with_suffix(".adapter").is_dir()


def test_a_run_that_saves_nothing_says_so(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = config(trainer__callbacks=None, trainer__enable_checkpointing=False)
    assert main(["fit", "--config", str(path)]) == 0
    assert "nothing saves what is trained" in " ".join(capsys.readouterr().err.split())


def test_what_runs_without_a_checkpoint_or_writes_nothing_says_so(config: Callable[..., Path]) -> None:
    with (
        pytest.warns(UserWarning, match="no ckpt_path is given, so predict runs with an adapter that is not trained"),
        pytest.warns(UserWarning, match="no callback writes the images that predict draws: add ImageWriter"),
    ):
        assert main(["predict", "--config", str(config()), "--return_predictions", "false"]) == 0


def test_last_where_each_run_has_a_folder_of_its_own(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = {"class_path": "tests.shared_logger.SharedLogger", "init_args": {"save_dir": str(tmp_path / "logs")}}
    path = config(trainer__logger=logger, trainer__callbacks=[{"class_path": "AdapterCheckpoint"}])
    assert main(["fit", "--config", str(path), "--ckpt_path", "last", "--must_resume", "true"]) == 2
    assert "SharedLogger gives each run a folder of its own: set AdapterCheckpoint's dirpath" in capsys.readouterr().err


def test_last_in_a_run_that_only_tries(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = config(trainer__callbacks=[{"class_path": "AdapterCheckpoint"}])
    assert main(["fit", "--config", str(path), "--trainer.fast_dev_run", "true", "--ckpt_path", "last"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "trainer.fast_dev_run has no logger, in whose folders the checkpoints of runs are: give the checkpoint's"
        in told
    )
    assert "DummyLogger" not in told
