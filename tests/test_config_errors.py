"""A mistake in the config is one sentence with the key, the value and what would be right."""

from __future__ import annotations

import pytest
import torch
import yaml

from lit_lora.cli import main

BASE = [
    "fit",
    "--model.family",
    "StableDiffusion",
    "--model.adapter",
    "LoraConfig",
    "--model.optimizer",
    "torch.optim.AdamW",
]
BASE += ["--data", "WebDatasetDataModule", "--model.family.init_args.pretrained_model_name_or_path", "embedded"]


def console(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main([*BASE, *arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [
                "--data",
                "WebDatasetStreamDataModule",
                "--data.init_args.batches_per_epoch=1",
                "--data.init_args.train_sets=[]",
            ],
            "Option 'train_sets' is not accepted\nseveral sets are for WebDatasetDataModule, which plans from indexes",
        ),
        (
            ["--trainer.accumulate_grad_batches", "0"],
            "trainer.accumulate_grad_batches=0 is too small; it must be at least 1",
        ),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val=-1 is too small; it must be at least 0"),
        (["--trainer.accelerator", "tpu"], "a part of the config cannot be built: Requirement 'torch_xla"),
        (["--model.family", "StableDifusion"], "there is no class StableDifusion; did you mean StableDiffusion?"),
        (["--model.adapter", "LoraConfi"], "there is no class LoraConfi; did you mean LoraConfig?"),
        (["--model.adapter", "peft.LoraConfi"], "peft has no LoraConfi; did you mean LoraConfig?"),
        (
            ["--model.objective", "PriorPreservation"],
            "PriorPreservation is no Objective; choose from DDPM, FlowMatching\nPriorPreservation belongs to an objective",
        ),
        (["--model.quantization", "DDPM"], "DDPM is no Quantization; choose from Dense, FP8, Int8, NF4, W8A8"),
        (["--model.adapter", "DDPM"], "DDPM is no PeftConfig; choose from AdaLoraConfig, "),
        (
            ["--model.new_tokens", "{on: 2}"],
            "model.new_tokens has the key True, which is no text: YAML reads yes, no, on",
        ),
        (["--model.optimizer", "torch.optim.AdamX"], "torch.optim has no AdamX; did you mean Adam?"),
        (["--trainer.logger", "Logger"], "trainer.logger: "),
        (["--model.optimizer", "nowhere.AdamW"], "there is no module nowhere; install it, or correct the path"),
        (["--model.optimizer.init_args.lr", "fast"], "lr: 'fast' is not a float or Tensor"),
        (["--model.adapter.init_args.r", "many"], "r: 'many' is not an int"),
        (["--model.caption_dropout", "some"], "model.caption_dropout: 'some' is not a float"),
        (["--model.quantization", "nf4"], "model.quantization: 'nf4' is not a Quantization\nquantizations are Int8,"),
        (
            ["--model.objective.class_path", "FlowMatching", "--model.objective.init_args.density", "Lognormal"],
            "no class",
        ),
        (["--trainer.callbacks+=AdapterCheckpiont"], "no class AdapterCheckpiont; did you mean AdapterCheckpoint?"),
        (["--trainer.precision", "fp17"], "trainer.precision: 'fp17' is none of 64, 32, 16, transformer-engine,"),
        (["--data.init_args.train_shards", "[1, 2]"], "train_shards: '[1, 2]' is not a str or list[str]"),
        (["--data.init_args.chunks", "null"], "data.init_args.chunks is null; leave it out, or give its options"),
        (["--model.adaptor.r", "4"], "Unrecognized arguments: --model.adaptor.r 4\nlit-lora COMMAND --help"),
    ],
)
def test_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, message = console(capsys, *arguments)
    assert status == 2
    assert sentence in message
    assert not [word for word in ("Parser key", "Union", "<class", "Traceback", "Namespace(") if word in message]
    assert len(message.splitlines()) <= 4


@pytest.mark.parametrize("command", ["fit", "validate", "plan"])
def test_a_required_option_is_named_with_what_to_type(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--data", "WebDatasetDataModule"])
    assert exit_.value.code == 2
    _, told = capsys.readouterr().err.splitlines()
    assert told.startswith(
        "model.family is not given; give it in a config, such as --config configs/sd15.yaml; lit-lora train"
    )


def test_a_refused_option_of_a_callback_is_its_sentence_alone(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = console(capsys, "--trainer.callbacks+=RankBudget", "--trainer.callbacks.mean_rank", "0.5")
    assert status == 2
    assert err.splitlines()[1:] == ["mean_rank=0.5 is too small; it must be at least 1"]


def test_what_differs_from_the_defaults_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Classes whose default is null, such as the data, and whose default is a string, such as a strategy."""
    options = [
        "--data.init_args.batch_size",
        "3",
        "--trainer.strategy.class_path",
        "LitLoraFSDP",
        "--model.adapter.init_args.r",
        "5",
    ]
    status, output, _ = console(capsys, *options, "--print_config=skip_default")
    assert status == 0
    config = yaml.safe_load(output)
    assert list(config["trainer"]) == ["strategy"]
    assert config["trainer"]["strategy"]["class_path"] == "lit_lora.LitLoraFSDP"
    assert config["data"] == {"class_path": "lit_lora.WebDatasetDataModule", "init_args": {"batch_size": 3}}
    assert config["model"]["adapter"]["init_args"]["r"] == 5
    assert config["model"]["optimizer"]["class_path"] == f"{torch.optim.AdamW.__module__.rpartition('.')[0]}.AdamW"


def test_two_callbacks_with_one_entry_in_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    twice = [
        "--trainer.callbacks+=AdapterEMA",
        "--trainer.callbacks+=AdapterEMA",
        "--model.optimizer.init_args.lr=1e-4",
    ]
    status, _, error = console(capsys, *twice, "--trainer.accelerator=cpu")
    assert status == 2
    assert "trainer.callbacks has two AdapterEMA whose states checkpoints could not tell apart; remove one" in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--trainer.callbacks.help", "AdapterChekpoint"],
            "--trainer.callbacks.help: there is no class AdapterChekpoint; did you mean",
        ),
        (["--data.help", "WebDataset"], "--data.help: there is no class WebDataset"),
        (
            ["--data.decoder.help", "ImageDecoder"],
            "name the other one first, as in --data WebDatasetDataModule --data.decoder.help",
        ),
        (["--data.buckets.help"], "write a class, as in --data WebDatasetDataModule"),
    ],
)
def test_a_help_that_is_not_found_says_what_to_type(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
