"""Mistakes in config files that are told before the libraries are imported."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch import Trainer

from lit_lora.cli import TRAINER_COMMANDS, main
from lit_lora.config_files import (
    check_config_files,
    check_config_given,
    check_options,
    given_configs,
    shipped_config,
)
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion


def check(path: Path, text: str, method: str | None = "fit") -> None:
    path.write_text(text)
    check_config_files(["--config", str(path)], method)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_stepz: 3}", r": there is no option trainer.max_stepz; did you mean trainer.max_steps\?"),
        ("model: {familly: {}}", r": there is no option model.familly; did you mean model.family\?"),
        ("optimizer: {lr: 1}", r": there is no option optimizer; did you mean model.optimizer\?"),
        ("modell: {}", r": there is no option modell; did you mean model\?"),
        ("model: {zzz: 1}", ": there is no option model.zzz; lit-lora COMMAND --help lists"),
    ],
)
def test_unknown_keys_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        check(tmp_path / "x.yaml", text)


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("--trainer.max_stepz", "did you mean --trainer.max_steps?"),
        ("--trainr.max_steps=3", "did you mean --trainer.max_steps?"),
        ("--max_steps", "did you mean --trainer.max_steps?"),
        ("--lr=3", "did you mean --model.optimizer.init_args.lr?"),
        ("--model.adaptor.r", "did you mean --model.adapter?"),
        ("--modell.adapter.r", "did you mean --model?"),
        ("--model.zzz+=1", "lit-lora COMMAND --help lists all options"),
        ("--zzz", "lit-lora COMMAND --help lists all options"),
    ],
)
def test_unknown_options_are_refused(option: str, advice: str) -> None:
    with pytest.raises(UserError) as refused:
        check_options([option, "3"], "fit")
    assert str(refused.value) == f"there is no option {option.partition('=')[0].rstrip('+')}; {advice}"


@pytest.mark.parametrize(
    "option",
    [
        *("--config", "--print_config=skip_default", "--help", "--seed_everything", "--ckpt_path", "--must_resume"),
        *("--trainer.max_ste", "--trainer.callbacks+=A", "--trainer.callbacks.help", "--model.adapter.init_args.r=3"),
        *("--model", "--data.zzz", "-c", "--", "zzz"),
    ],
)
def test_options_that_may_exist_are_left_to_the_parser(option: str) -> None:
    check_options([option], "fit")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("trainer.max_steps", "many", "'many' is not an int"),
        ("trainer.max_steps", "3.5", "'3.5' is not an int"),
        ("trainer.limit_val_batches", "all", "'all' is not a float or int"),
        ("trainer.deterministic", "wran", "'wran' is neither a bool nor one of warn"),
        ("model.compile_blocks", "maybe", "'maybe' is not a bool"),
        ("model.base_dtype", "bf16", "'bf16' is none of float32, bfloat16, float16"),
    ],
)
def test_impossible_values_are_refused(option: str, value: str, message: str, tmp_path: Path) -> None:
    for arguments in ([f"--{option}", value], [f"--{option}={value}"]):
        with pytest.raises(UserError) as refused:
            check_options(arguments, "fit")
        assert str(refused.value) == f"--{option}: {message}"
    part, _, name = option.partition(".")
    with pytest.raises(UserError) as refused:
        check(tmp_path / "x.yaml", f"{part}: {{{name}: {value}}}")
    assert str(refused.value) == f"{tmp_path / 'x.yaml'}: {option}: {message}"


@pytest.mark.parametrize(
    "option",
    [
        *("trainer.max_steps=1e3", "trainer.max_steps=null", "trainer.max_steps=[1]", "trainer.limit_val_batches=0.5"),
        *("trainer.deterministic=warn", "trainer.deterministic=yes", "trainer.val_check_interval=00:01:00:00"),
        *("trainer.accelerator=any", "trainer.callbacks=any", "model.adapter=any", "model.seed={", "model.seed=--zzz"),
    ],
)
def test_values_that_may_be_possible_are_left_to_the_parser(option: str) -> None:
    check_options([f"--{option}"], "fit")


def test_every_precision_of_lightning_is_possible() -> None:
    values = [value for literal in get_args(_PRECISION_INPUT) for value in get_args(literal)]
    assert len(values) > 10
    for value in values:
        check_options(["--trainer.precision", str(value)], "fit")
    with pytest.raises(UserError, match=r"'fp17' is none of 64, 32, 16, .*16-mixed"):
        check_options(["--trainer.precision", "fp17"], "fit")


def test_options_of_its_own_are_left_to_a_tool() -> None:
    check_options(["--device_memory", "12"])
    with pytest.raises(UserError, match=r"--model.sed; did you mean --model.seed\?"):
        check_options(["--device_memory", "12", "--model.sed", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_steps: 3}\nmodel: {}\ntrainer: {}\n", "trainer is given twice in lines 1 and 3"),
        ("model:\n  optimizer:\n    init_args: {lr: 1, lr: 2}\n", "lr is given twice in lines 3 and 3"),
        ("trainer:\n  callbacks:\n  - {class_path: A, class_path: B}\n", "class_path is given twice"),
        ("trainer.max_steps: 3\ntrainer: {max_steps: 4}\n", "trainer.max_steps is given twice, as a path"),
        ("model:\n  adapter.r: 3\n  adapter: {init_args: {r: 4}}\n", "model.adapter.r is given twice, as a path"),
    ],
)
def test_keys_that_are_given_twice_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        check(tmp_path / "x.yaml", text)


@pytest.mark.parametrize("command", [*TRAINER_COMMANDS, "plan", "cache", "shards plan"])
def test_a_command_without_a_config_says_what_to_type(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--trainer.max_steps", "3"]):
        assert main([*command.split(), *options]) == 2
        told = capsys.readouterr().err
        assert f"--config is missing, such as lit-lora {command} --config configs/sd15.yaml;" in told
        assert "lit-lora train FOLDER --base sd15" in told


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.max_steps", "3", "--help"],
        ["-h"],
        ["-c", "x"],
        ["--model.family=A"],
        ["--data", "B"],
        ["--print_config"],
    ],
)
def test_options_of_model_or_data_are_left_to_the_parser(options: list[str]) -> None:
    check_config_given(options, "fit")


@pytest.mark.parametrize("part", ["trainer", "model", "data"])
def test_a_part_without_options_is_refused(part: str, tmp_path: Path) -> None:
    # jsonargparse would drop all options that an earlier config gives it.
    with pytest.raises(UserError, match=f"has {part} without options, which drops all those of configs before it"):
        check(tmp_path / "x.yaml", f"{part}:\n  # max_steps: 3\n")


@pytest.mark.parametrize(
    "text",
    [
        "model.family.class_path: X",
        "model: {adapter.r: 3, adapter: {rank_pattern: {a: 1, a.b: 2, b.a: 3}}}",
        "trainer: {callbacks+: []}",
        "seed_everything: 1\nckpt_path: last\nmust_resume: true\ndata: {class_path: X, init_args: {any: 1}}",
        "trainer: {",  # whose line the parser names
        "[]",
        "",
    ],
)
def test_the_rest_is_left_to_the_parser(text: str, tmp_path: Path) -> None:
    check(tmp_path / "x.yaml", text)


def test_a_config_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"is a folder; name a YAML file, such as .*config.yaml"):
        check_config_files(["--config", str(tmp_path)])
    with pytest.raises(UserError, match="--config needs the path of a file, such as lit-lora plan --config"):
        check_config_given(["--search", "true", "--config"], "plan")
    with pytest.raises(UserError, match=r"--config is missing, such as lit-lora fit --config my.yaml;"):
        check_config_given(["my.yaml"], "fit")


def test_options_of_a_tool_are_left_to_the_parser(tmp_path: Path) -> None:
    check(tmp_path / "x.yaml", "device_memory: 12", method=None)


def test_all_options_of_trainer_and_module_are_known(tmp_path: Path) -> None:
    for part, owner in (("trainer", Trainer), ("model", LoraDiffusion)):
        options = list(inspect.signature(owner).parameters)
        check(tmp_path / "x.yaml", f"{part}: {{{', '.join(f'{name}: 1' for name in options)}}}")


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_all_options_of_the_trainers_methods_are_known(method: str, tmp_path: Path) -> None:
    names = inspect.signature(getattr(Trainer, method)).parameters.keys() - {"self"}
    check(tmp_path / "x.yaml", "\n".join(f"{name}: 1" for name in names), method)


def test_a_missing_file_is_named_with_a_similar_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file; did you mean configs/overlays/12gb.yaml\?"):
        check_config_files(["--config=configs/overlays/12gbb.yaml"])
    Path("mine.yaml").write_text("")
    with pytest.raises(UserError, match=r"no such file; did you mean mine.yaml\?"):
        check_config_files(["-c", "nine.yaml"])
    with pytest.raises(UserError, match="give the path of a YAML file"):
        check_config_files(["-c", "nothing_like_it"])
    check_config_files(["--config", "{trainer: {max_steps: 1}}"])  # jsonargparse takes text as well
    assert Path(shipped_config("configs/sdxl.yaml")).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--config", "missing.yaml"], "--config missing.yaml: there is no such file"),
        (["--config", "configs/demo.yaml", "--max_steps=3"], "there is no option --max_steps"),
        (["--config", "configs/demo.yaml", "--trainer.precision", "fp17"], "--trainer.precision: 'fp17' is none of"),
    ],
)
def test_a_refusal_imports_no_library(options: list[str], sentence: str, tmp_path: Path) -> None:
    program = (
        f"import sys\nfrom lit_lora.cli import main\nstatus = main(['fit', *{options!r}])\n"
        "print(status, *sys.modules.keys() & {'torch', 'lightning', 'diffusers', 'peft', 'jsonargparse'})"
    )
    folder = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": folder},
    )
    assert done.stdout == "2\n", done.stderr
    assert sentence in done.stderr


def test_a_command_without_arguments_has_no_configs() -> None:
    check_config_files([], "fit")
    assert list(given_configs([])) == []
