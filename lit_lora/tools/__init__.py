"""The commands beside training, one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from lit_lora.console import print_error


class ToolParser(ArgumentParser):
    """Reports an error as one message, without usage, with exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print_error(message)
        self.exit(2)


def run_tool(function: Callable[..., Any] | dict[str, Any], arguments: list[str], prog: str, **options: Any) -> Any:
    """Call a typed function, or one of several, with the arguments of a command line.

    Args:
        function: Function to call, or functions by the name of their subcommand.
        arguments: Arguments of the command line.
        prog: Name of the command, for its help.
        **options: Further options of the parser.
    """
    return auto_cli(function, args=arguments, prog=prog, parser_class=ToolParser, as_positional=True, **options)
