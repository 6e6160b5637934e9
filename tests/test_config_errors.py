"""A mistake in the config is one sentence with the key, the value and what would be right."""

from __future__ import annotations

import pytest
import torch
import yaml

from lit_lora.cli import main
from lit_lora.config_errors import explain

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
            "there is no option train_sets of WebDatasetStreamDataModule; did you mean train_shards?\nseveral sets are for ",
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
        (
            ["--model.memory.gradient", "1"],
            "there is no option --model.memory.gradient; did you mean --model.memory.gradi",
        ),
        (["--trainer.callbacks+=SampleImages"], "SampleImages needs prompts, which is not given"),
        (["stray"], "'stray' is neither an option nor follows one; lit-lora COMMAND --help lists all"),
        (["-x", "3"], "'-x' is neither an option nor follows one; lit-lora COMMAND --help lists all options"),
        (["--model.optimizer", "adamw"], "model.optimizer: 'adamw' is no class; did you mean AdamW?"),
        (
            ["--model.lr_scheduler", "cosine"],
            "model.lr_scheduler: 'cosine' is no class; write the name of one, such as t",
        ),
        (["--model.family", "null"], "model.family: null is no ModelFamily; write the name of a class"),
        (["--model.quantization", "Foo"], "there is no class Foo; choose from Dense, FP8, Int8, NF4, W8A8"),
        (
            ["--model.family", "XL"],
            "there is no class XL; write the name of a class, with its module unless it is ours",
        ),
        (["--model.new_tokens", "[a]"], "model.new_tokens: \"['a']\" is not a dict[str, int | str]"),
        (["--model.base_adapters", "x"], "model.base_adapters: 'x' is not a list"),
        (["--model.adapter.init_lora_weights", "x"], "pissa, pissa_niter_[number of iters], corda, loftq"),
        (["--seed_everything", "-1"], "seed_everything=-1 is too small; it must be at least 0"),
        (["--seed_everything", "4294967296"], "seed_everything=4294967296 is too"),
        (["--trainer.logger", "Logger"], "trainer.logger: "),
        (["--model.optimizer", "nowhere.AdamW"], "there is no module nowhere; install it, or correct the path"),
        (["--model.optimizer.init_args.lr", "fast"], "lr of AdamW: 'fast' is not a float or Tensor"),
        (["--model.adapter.init_args.r", "many"], "r of LoraConfig: 'many' is not an int"),
        (
            ["--data.train_sets", "[{shards:/a/b}]"],
            "shards:/a/b is read as the name of an option; write a space after the colon, as in shards: /a/b",
        ),
        (["--model.optimizer.init_args.lrr", "1"], "there is no option lrr of AdamW; did you mean lr?"),
        (
            ["--model.adapter.init_args.zzzz", "1"],
            "there is no option zzzz of LoraConfig; its documentation lists them",
        ),
        (
            ["--data.buckets.zzzz", "1"],
            "there is no option zzzz of AspectRatioBuckets; the options there are divisor, max_",
        ),
        (
            ["--data.decoder.init_args.captions.zzzz", "1"],
            "there is no option captions.zzzz of ImageDecoder; the options there are dropout, keep_tags,",
        ),
        (
            ["--model.memory", '{"vae_slice": true}'],
            "no option model.memory.vae_slice; did you mean model.memory.vae_sl",
        ),
        (["--model.memory.zzzz", "1"], "there is no option --model.memory.zzzz; the options there are gradient_check"),
        (["--trainer.profiler", "simple", "--trainer.profiler.zzzz", "1"], "profiler: 'zzzz: 1' is not a str or Prof"),
        (["--model.caption_dropout", "some"], "model.caption_dropout: 'some' is not a float"),
        (["--model.quantization", "nf4"], "model.quantization: 'nf4' is not a Quantization\nquantizations are Int8,"),
        (
            ["--model.objective.class_path", "FlowMatching", "--model.objective.init_args.density", "Lognormal"],
            "no class",
        ),
        (["--trainer.callbacks+=AdapterCheckpiont"], "no class AdapterCheckpiont; did you mean AdapterCheckpoint?"),
        (["--trainer.precision", "fp17"], "trainer.precision: 'fp17' is none of 64, 32, 16, transformer-engine,"),
        (
            ["--data.init_args.train_shards", "[1, 2]"],
            "train_shards of WebDatasetDataModule: '[1, 2]' is not a str or list[str]",
        ),
        (["--data.init_args.chunks", "null"], "data.init_args.chunks is null; leave it out, or give its options"),
        (["--model.adaptor.r", "4"], "there is no option --model.adaptor.r; did you mean --model.adapter?"),
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
        (["--data", "Zzz", "--data.buckets.help"], "data: there is no class Zzz"),
        (["--trainer.callbacks.help"], "expected one argument\nwrite the name of a class after it"),
        (["--model.objective.prior.help"], "an option of a class needs the class first, as in --model.objective DDPM"),
    ],
)
def test_a_help_that_is_not_found_says_what_to_type(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--data.help"], "lit_lora.WebDatasetDataModule"),
        (["--data.help", "--data", "WebDatasetStreamDataModule"], "lit_lora.WebDatasetStreamDataModule"),
        (["--config", "configs/demo.yaml", "--model.adapter.help"], "peft.LoraConfig"),
        (["--config", "configs/demo.yaml", "--data.buckets.help"], "lit_lora.AspectRatioBuckets"),
        (["--data.buckets.help", "AspectRatioBuckets"], "lit_lora.AspectRatioBuckets"),
        (["--data", "WebDatasetDataModule", "--data.chunks.help"], "lit_lora.Chunks"),
        (["--config", "configs/demo.yaml", "--data.decoder.captions.help"], "lit_lora.Captions"),
        (["--data.decoder.help"], "lit_lora.ImageDecoder"),
        (["--data.decoder.help=EditDecoder"], "lit_lora.EditDecoder"),
        (["--model.objective=DDPM", "--model.objective.prior.help"], "lit_lora.PriorPreservation"),
        (["--model.objective.help"], "lit_lora.Objective, whose classes are DDPM,"),
    ],
)
def test_help_is_of_the_class_that_is_named(
    arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("Help for --")
    assert shown in told.partition("\n\n")[0]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "Unrecognized arguments: --device_memry 12",
            "there is no option --device_memry; did you mean --device_memory?",
        ),
        ("Option 'device_memry' is not accepted", "there is no option device_memry; did you mean device_memory?"),
    ],
)
def test_options_of_the_command_line_have_dashes(message: str, told: str) -> None:
    assert explain(message, ["device_memory"]) == told
