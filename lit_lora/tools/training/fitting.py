"""``lit-lora fit`` as ``lit-lora train`` runs it."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from peft import PeftConfig

from lit_lora.adapters.parameter_groups import make_optimizer
from lit_lora.callbacks.run_report import RunReport
from lit_lora.callbacks.step_progress import StepProgress
from lit_lora.distributed import check_strategy_name
from lit_lora.errors import UserError
from lit_lora.lightning_cli import LitLoraCLI, ToolCLI, build_cli, run
from lit_lora.planning.fake_module import build, fake_tensors
from lit_lora.tools.training.config import write_yaml
from lit_lora.trainer_options import check_trainer_options


def _nothing() -> None:
    """Build the parts of a run."""


class _PartsCLI(ToolCLI):
    command = "lit-lora train"
    function = staticmethod(_nothing)
    parts = frozenset()


class _CheckCLI(_PartsCLI):
    """Parses a config, and builds configs of adapters alone."""

    def instantiate_classes(self) -> None:
        trainer = self.config["trainer"]
        check_strategy_name(trainer["strategy"])
        with warnings.catch_warnings():  # the options that are not chosen yet may make them false
            warnings.simplefilter("ignore")
            check_trainer_options(trainer)
        with self.mistakes_told():  # PEFT checks options together when its config is made
            for given in filter(None, (self.config["model"]["adapter"], self.config["model"]["text_adapter"])):
                parser = ArgumentParser()
                parser.add_subclass_arguments(PeftConfig, "adapter")
                parser.instantiate_classes(parser.parse_object({"adapter": given}))


class FitCLI(LitLoraCLI):
    """``lit-lora fit`` for commands that end with lines of their own: no list of files, another way to go on."""

    goes_on = "the same command goes on"

    def before_fit(self) -> None:
        super().before_fit()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepProgress | RunReport):
                callback.lists_files = False


def parts(arguments: Sequence[str]) -> LitLoraCLI:
    """Module and datamodule of a config."""
    return build_cli(arguments, run=False, cli_class=_PartsCLI)


def parts_of(config: Mapping[str, Any]) -> LitLoraCLI:
    """Module and datamodule of a config that is in no file."""
    with _in_file(config) as path:
        return parts(["fit", "--config", path])


def check_config(config: Mapping[str, Any]) -> None:
    """Check names and types of the keys of a config that is in no file, and the options of trainer and adapters.

    Only the configs of adapters are built.

    Raises:
        UserError: If an option of the trainer or of an adapter cannot work.
        SystemExit: If a key or a value is wrong, after a message.
    """
    with _in_file(config) as path:
        build_cli(["fit", "--config", path], run=False, cli_class=_CheckCLI)


def check_model(config: Mapping[str, Any], cached: bool) -> None:
    """Build the model of a config that is in no file, without its weights, and its optimizer, which check their options together.

    Args:
        config: The config.
        cached: Whether captions are encoded before training.

    Raises:
        UserError: If the adapter does not fit the base, the optimizer refuses an option, or text encoders are to be trained on
            captions that are encoded before.
    """
    module = parts_of(config).model
    if cached and module.text_training:
        raise UserError("text encoders are trained, and --cache encodes the captions before that; add --cache false")
    with fake_tensors():
        make_optimizer(module.optimizer, build(module, without=()), module.parameter_groups)


@contextmanager
def _in_file(config: Mapping[str, Any]) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(write_yaml(config, {}))
        file.flush()
        yield file.name


def check_machine(trainer: Mapping[str, Any]) -> None:
    """Check that this machine has the devices that a trainer is to train on.

    Args:
        trainer: Options of the trainer.

    Raises:
        UserError: If it has not.
    """
    options = {name: trainer[name] for name in ("accelerator", "devices", "num_nodes") if name in trainer}
    try:
        Fabric(**options)  # checks them as a trainer does, and says nothing
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        told = ", ".join(f"trainer.{name}={value!r}" for name, value in options.items())
        raise UserError(
            f"this machine cannot train with {told}: {str(error).rstrip('.!')}. Leave them out to train on the device that it "
            "has, or add --dry_run to write the config for another machine"
        ) from error


def fit(arguments: Sequence[str]) -> Trainer:
    """Run ``lit-lora fit``, and return its trainer.

    Args:
        arguments: ``["fit", "--config", …]``.
    """
    with _started_as(arguments):
        return run(arguments, FitCLI).trainer


def out_of_time(trainer: Trainer) -> bool:
    """Whether a trainer has used up the time that it was given."""
    timers = [one for one in trainer.callbacks if isinstance(one, Timer)]  # type: ignore[attr-defined]
    remaining = [one.time_remaining() for one in timers]
    return any(seconds is not None and seconds <= 0 for seconds in remaining)


@contextmanager
def _started_as(arguments: Sequence[str]) -> Iterator[None]:
    """A context in which Lightning's launcher starts further processes with these arguments, not as ``lit-lora train`` again."""
    given = sys.argv
    sys.argv = [given[0], *arguments]
    try:
        yield
    finally:
        sys.argv = given


def resuming(run: Path, out: Path) -> list[str]:
    """Options of ``fit`` by which it goes on with a run.

    Args:
        run: Folder of the run.
        out: Folder in which ``lit-lora train`` works.
    """
    if run.parent.name == "lightning_logs" and (run / "metrics.csv").exists():
        return ["--ckpt_path", "last"]  # CSVLogger would delete what is logged in this version
    if run.parent.name == "lightning_logs":
        return ["--ckpt_path", "last", "--trainer.logger.init_args.version", run.name.removeprefix("version_")]
    # Without a logger there is one folder; other loggers than TensorBoard and CSV begin another.
    return ["--ckpt_path", "last" if run == out else str(run / "checkpoints" / "last.ckpt")]
