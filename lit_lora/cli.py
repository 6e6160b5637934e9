"""The command line: ``lit-lora COMMAND …``.

Help and dispatch are static and need no heavy import; each command imports what it needs when it runs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

from lit_lora.first_imports import first_imports
from lit_lora.own_process import check_process, open_standard_streams
from lit_lora.signals import Terminated, ending_on_sigterm

USAGE = """usage: lit-lora COMMAND [options]

Adapter training for diffusion models.

training
  train     train an adapter on a folder of images, with settings that fit them
  fit       train an adapter
  validate  compute the loss on the validation shards
  test      compute the loss on the test shards
  predict   draw an image for each caption of the validation shards

tools
  plan      predict the memory, time and file sizes of a run before it starts
  demo      train on handwritten digits in minutes, without downloading anything
  sample    draw images with adapters, and compare checkpoints and scales
  prior     draw images of the class with the base, for prior preservation
  report    write a page about a run: losses, samples, memory, settings
  cache     encode images and captions once, to train without the encoders
  shards    pack, index, check and describe WebDataset shards
  adapter   describe, check, convert, resize, merge, extract and push adapters

examples
  lit-lora train my_images --base sdxl --trigger "sks dog"
  lit-lora plan --config configs/sd15.yaml
  lit-lora fit --config configs/sd15.yaml
  lit-lora COMMAND --help
"""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

_OF_SHARDS = ("pack", "index", "check", "info")
_OF_ADAPTER = ("info", "check", "diff", "convert", "resize", "merge", "extract", "push")


def _train(arguments: list[str]) -> None:
    from lit_lora.distributed.processes import end_with_parent
    from lit_lora.tools import train

    end_with_parent()
    train.train_command(arguments)


def _demo(arguments: list[str]) -> None:
    from lit_lora.tools import demo, run_tool

    run_tool(demo.demo, arguments, "lit-lora demo")


def _sample(arguments: list[str]) -> None:
    with first_imports():
        from lit_lora.tools import sample

    sample.sample_command(arguments)


def _prior(arguments: list[str]) -> None:
    with first_imports():
        from lit_lora.tools import prior

    prior.prior_command(arguments)


def _report(arguments: list[str]) -> None:
    with first_imports():
        from lit_lora.tools import report, run_tool

    run_tool(report.report, arguments, "lit-lora report")


def _cache(arguments: list[str]) -> None:
    with first_imports():
        from lit_lora.tools import cache

    cache.cache(arguments)


def _shards(arguments: list[str]) -> None:
    if arguments[:1] == ["plan"]:
        with first_imports():
            from lit_lora.tools import shards_plan

        shards_plan.shards_plan(arguments[1:])
        return
    from lit_lora.tools import run_tool, shards

    commands = {name: getattr(shards, name) for name in _OF_SHARDS}
    epilog = (
        "A fifth subcommand takes the options of lit-lora fit: lit-lora shards plan --config FILE describes the data of a run"
        " before it starts."
    )
    run_tool(commands, arguments, "lit-lora shards", epilog=epilog)


def _adapter(arguments: list[str]) -> None:
    from importlib import import_module

    from lit_lora.freed_memory import given_back
    from lit_lora.tools import run_tool
    from lit_lora.tools.adapter_arguments import adapter_arguments

    commands = {name: getattr(import_module(f"lit_lora.tools.adapter_{name}"), name) for name in _OF_ADAPTER}
    with given_back():
        run_tool(commands, adapter_arguments(arguments), "lit-lora adapter")


def _plan(arguments: list[str]) -> int:
    with first_imports():
        from lit_lora.tools import plan

    return plan.plan_command(arguments)


TOOLS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "plan": _plan,
    "demo": _demo,
    "sample": _sample,
    "prior": _prior,
    "report": _report,
    "cache": _cache,
    "shards": _shards,
    "adapter": _adapter,
}
"""Commands that do not run a trainer. They return the exit status; None means 0."""

_WITH_CONFIGS = ("plan", "cache", "shards plan")
"""Tools that take the options of ``fit``."""

_GO_ON = ("train", "cache", "prior", "shards pack", "shards index")
"""Commands that keep what they have done when they are interrupted."""

_AFTER_TRAINING = {
    "train": "the same command goes on",
    "demo": "start it again",
    "fit": "resume from the last saved checkpoint with --ckpt_path last",
}
"""How commands go on that were interrupted while they trained."""

_MAY_BE_EMPTY = ("--prompts", "--negative_prompt", "--trigger")
"""Options of tools for texts; others name a file, a folder or a choice."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command and its options; defaults to the arguments of the process.

    Returns:
        Exit status: 2 for a user error, 1 if a plan does not fit, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        SystemExit: If a signal stops ``fit``, with 128 plus the signal's number (143 for SIGTERM).
    """
    open_standard_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from lit_lora import __version__

        print(f"lit-lora {__version__}")
        return 0
    command = arguments[0]
    from lit_lora import console

    if command not in (*TRAINER_COMMANDS, *TOOLS):
        console.print_mistake(_unknown(command))
        return 2
    console.quiet_libraries()
    try:
        check_process()
        status = _run(arguments)
        sys.stdout.flush()  # here, where a closed pipe can still be told from a fault
        return status
    except KeyboardInterrupt as error:
        goes_on = command in _GO_ON or " ".join(arguments[:2]) in _GO_ON
        return _interrupted(error, "the same command goes on" if goes_on else "")
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        # Lightning has ended the run and exits; what the last checkpoint has is kept.
        return _interrupted(error.__context__, _AFTER_TRAINING.get(command, ""))
    except Exception as error:
        return console.report(error)


def _interrupted(error: KeyboardInterrupt, how: str) -> int:
    """Tell that a signal has ended a command and how it goes on, and return the exit status."""
    terminated = isinstance(error, Terminated)
    told = "terminated" if terminated else "interrupted"
    print("; ".join(filter(None, [f"lit-lora: {told}", how])), file=sys.stderr)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _unknown(command: str) -> str:
    from difflib import get_close_matches

    whole = [f"shards {command}"] if command in _OF_SHARDS else []
    whole += [f"adapter {command}"] if command in _OF_ADAPTER else []
    near = whole or get_close_matches(command, (*TRAINER_COMMANDS, *TOOLS), 1)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown command {command!r}; {meant}lit-lora --help lists all commands"


def _run(arguments: list[str]) -> int:
    """Run the command after what needs no heavy import: its help if that is kept, and the checks of its config files."""
    from lit_lora import kept_help
    from lit_lora.config_files import check_config_files, check_config_given, check_options

    command, *rest = arguments
    if kept_help.asks_for_help(arguments):
        return kept_help.print_help(arguments, lambda: _call(arguments))
    if arguments[:2] == ["shards", "plan"]:
        command, rest = "shards plan", rest[1:]
    if command in (*TRAINER_COMMANDS, *_WITH_CONFIGS):
        method = command if command in TRAINER_COMMANDS else None
        check_config_given(rest, command)
        check_options(rest, method)
        check_config_files(rest, method)
    return _call(arguments)


def _call(arguments: list[str]) -> int:
    command, *rest = arguments
    if command in TOOLS:
        _check_none_empty(rest)
        with ending_on_sigterm():
            return TOOLS[command](rest) or 0
    _run_trainer(arguments)
    return 0


def _check_none_empty(arguments: list[str]) -> None:
    """Refuse empty paths, which would stand for the working folder."""
    from lit_lora.errors import UserError

    for before, argument in pairwise(["", *arguments]):
        name, equals, value = argument.partition("=")
        is_option = bool(equals) and name.startswith("--")
        option = name if is_option else before
        is_text = option.startswith("--") and any(text.startswith(option) for text in _MAY_BE_EMPTY)
        if not (value if is_option else argument) and not is_text and "." not in option:
            named = option if option.startswith("--") else "an argument"
            raise UserError(f"{named} is empty, as a variable of the shell may be; give it a value or leave it out")


def _run_trainer(arguments: list[str]) -> None:
    with first_imports():
        from lit_lora.distributed.processes import end_with_parent

        end_with_parent()
        from lit_lora.lightning_cli import run

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
