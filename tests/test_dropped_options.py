from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from lit_lora.dropped_options import dropped_options
from lit_lora.lightning_cli import build_cli


def test_options_that_another_class_does_not_take_are_named(tmp_path: Path) -> None:
    """An overlay changes the class: alpha would be LoHa's default without a word, and r stays."""
    overlay = tmp_path / "loha.yaml"
    overlay.write_text("model: {adapter: {class_path: peft.LoHaConfig}}\n")
    arguments = ["fit", "--config", "configs/demo.yaml", "--config", str(overlay), "--trainer.accelerator=cpu"]
    with pytest.warns(
        UserWarning, match=r"^model.adapter.init_args.lora_alpha=16 of .*demo.yaml has no effect, since LoHa"
    ):
        cli = build_cli(arguments, run=False)
    assert (cli.config["model"].adapter.init_args.r, cli.config["model"].adapter.init_args.alpha) == (16, 8)


def test_what_is_there_or_replaced_is_not_named(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(
        "model:\n  quantization: {class_path: NF4, init_args: {block: 64}}\n  adapter.init_args.r: 3\n"
        "data:\n  class_path: Data\n  decoder: {flip: true, gone: 1}\ntrainer:\n  callbacks: [{class_path: A}]\n"
    )
    decoder = Namespace(class_path="my.Decoder", init_args=Namespace(flip=True))
    parsed = Namespace(
        model=Namespace(quantization=None, adapter=Namespace(class_path="B", init_args=Namespace(r=4))),
        data=Namespace(class_path="Data", init_args=Namespace(decoder=decoder)),
        trainer=Namespace(callbacks=[]),
    )
    named = "data.decoder.gone=1 of {} has no effect, since Decoder has no such option"
    assert dropped_options(["--config", str(config)], parsed) == [named.format(config)]
    assert dropped_options([f"--config={config}"], parsed) == [named.format(config)]


def test_classes_in_a_list_that_a_later_config_replaces_are_named(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("trainer:\n  callbacks:\n  - {class_path: AdapterEMA}\n  - {class_path: lit_lora.RunReport}\n")
    arguments = ["fit", "--config", "configs/demo.yaml", "--config", str(first)]
    told = (
        r"^trainer.callbacks of .*demo.yaml: AdapterCheckpoint, SampleImages, ImageWriter are left out, since a later "
        r"list replaces it; trainer.callbacks\+ adds to it$"
    )
    with pytest.warns(UserWarning, match=told):
        build_cli(arguments, run=False)
    first.write_text(first.read_text().replace("callbacks", "callbacks+"))
    build_cli(arguments, run=False)  # a warning is an error
    lost = pytest.warns(UserWarning, match=r"demo.yaml: AdapterCheckpoint, SampleImages, ImageWriter are left out")
    with lost, pytest.warns(UserWarning, match=r"first.yaml: AdapterEMA is left out"):
        build_cli([*arguments, "--trainer.callbacks", "RunReport"], run=False)


def test_options_before_a_config_that_sets_them_are_named(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("trainer: {max_steps: 4, callbacks: []}\nmodel: {adapter: {init_args: {r: 4}}}\n")
    before = ["--trainer.max_steps=5", "--model.adapter.r", "8", "--trainer.callbacks+=A", "--trainer.max_time=1"]
    names = ["--trainer.max_steps", "--model.adapter.r", "--trainer.callbacks+"]
    expected = [f"{name} has no effect, since {config} sets it after it; give it after --config" for name in names]
    assert dropped_options([*before, "--config", str(config)], Namespace()) == expected
    assert dropped_options(["--config", str(config), *before], Namespace()) == []
