"""Options that do not exist: which one was probably meant."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from lit_lora.option_names import advice_for, option_names

FIT = ["trainer.max_steps", "trainer.max_epochs", "model.seed", "model.memory.vae_tiling", "data", "ckpt_path"]
TRAIN = ["out", "base", "lr", "steps", "trainer", "model", "data"]
TOOL = ["out", "steps"]


@pytest.mark.parametrize(
    ("given", "options", "meant"),
    [
        ("trainer.max_stepz", FIT, "trainer.max_steps"),
        ("trainr.max_steps", FIT, "trainer.max_steps"),
        ("max_epochs", FIT, "trainer.max_epochs"),
        ("model.memory.vae_tilin", FIT, "model.memory.vae_tiling"),
        ("learning_rate", FIT, "model.optimizer.init_args.lr"),
        ("learning_rate", TRAIN, "lr"),
        ("learning_rate", TOOL, None),
        ("train_shards", FIT, "data.init_args.train_shards"),
        ("train_steps", TRAIN, "steps"),
        ("resume", [*FIT, "must_resume"], "ckpt_path"),
        ("model_name", [*FIT, "model"], None),
        ("resume_from_checkpoint", FIT, "ckpt_path"),
        ("max_train_epochs", TRAIN, "trainer.max_epochs"),
        ("stepz", TOOL, "steps"),
        ("zzz", FIT, None),
        # In another part it has exactly that name.
        ("data.max_stepz", FIT, None),
    ],
)
def test_what_was_meant(given: str, options: list[str], meant: str | None) -> None:
    assert advice_for(given, options, "--") == (f"did you mean --{meant}?" if meant else None)


def test_options_of_subcommands_count() -> None:
    parser = ArgumentParser()
    parser.add_argument("--one")
    inner = parser.add_subparsers(dest="command").add_parser("inner")
    inner.add_argument("--two")
    inner.add_argument("--three.help")
    assert option_names(parser._actions) == {"one", "command", "two"}
