"""The parser of the commands that have a config."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from inspect import isabstract
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lit_lora.config_errors import derived, explain
from lit_lora.console import print_mistake
from lit_lora.help_screen import HelpScreen
from lit_lora.lazy import public_names
from lit_lora.option_names import option_names


class Parser(LightningArgumentParser):
    """Reports a config error as one message, without usage or traceback, with exit status 2.

    jsonargparse makes a further one for each class that a config names.
    """

    _of_class = ""

    def __init__(self, *arguments: Any, formatter_class: Any = HelpScreen, **options: Any) -> None:
        shows_class = str(options.get("description")).startswith("Help for --")
        if shows_class:
            options.setdefault("usage", SUPPRESS)  # it would repeat the list of options
        super().__init__(*arguments, formatter_class=formatter_class, **options)
        self._shows_class = shows_class

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, *args: Any, **options: Any) -> Any:
        if nested_key is None:
            self._of_class = theclass.__name__
        elif self._shows_class and isabstract(theclass) and theclass.__module__.startswith("lit_lora."):
            self.description = (
                f"{self.description}, whose classes are {', '.join(derived(theclass, sorted(public_names())))}"
            )
        return super().add_class_arguments(theclass, nested_key, *args, **options)

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """Parse arguments; jsonargparse 4.47 gives the parser of a class ``--option=None`` for a null of the command line."""
        if self._of_class and args is not None:
            texts = {f"{name}=None" for one in self._actions if _is_text(one) for name in one.option_strings}
            args = [one if one in texts else re.sub(r"^(--[^=]+=)None$", r"\1null", one) for one in args]
        return super().parse_args(args, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print_mistake(explain(message, option_names(self._actions), self._of_class), "config error")
        self.exit(2)

    def dump(self, cfg: Any, *arguments: Any, **options: Any) -> str:
        """Give a config as text; its values were checked when it was parsed, and checking them again takes time."""
        options.setdefault("skip_validation", True)
        text: str = super().dump(cfg, *arguments, **options)
        return text

    def _dump_delete_default_entries(self, subcfg: dict[str, Any], subdefaults: dict[str, Any]) -> None:
        """Keep classes that replace the default, where jsonargparse 4.47 drops those whose own options are all defaults,
        and fails if the default is null or a string.
        """
        classes = {
            name: part["class_path"] for name, part in subcfg.items() if isinstance(part, dict) and "class_path" in part
        }
        plain: dict[str, Any] = {
            name: {} for name in classes.keys() & subdefaults.keys() if not isinstance(subdefaults[name], dict)
        }
        super()._dump_delete_default_entries(subcfg, subdefaults | plain)
        for name, path in classes.items():
            if name not in subcfg and (name in plain or subdefaults[name].get("class_path") != path):
                subcfg[name] = {"class_path": path}


def parser_options(command: str, description: str) -> dict[str, Any]:
    """Options of a command's parser; its usage is one line, where the list of all options would fill a screen."""
    return {"prog": command, "usage": f"{command} --config FILE [options]", "description": description}


RUNS = {
    "fit": parser_options("lit-lora fit", "Train an adapter."),
    "validate": parser_options("lit-lora validate", "Compute the loss on the validation shards."),
    "test": parser_options("lit-lora test", "Compute the loss on the test shards."),
    "predict": parser_options("lit-lora predict", "Draw an image for each caption of the validation shards."),
}
"""Options of the parsers of the commands that run a trainer."""


def _is_text(action: Action) -> bool:
    """Whether an option takes any text, so that None is one."""
    return getattr(action, "_typehint", action.type) is str
