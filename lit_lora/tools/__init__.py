"""The commands beside training, one file each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli


class ToolParser(ArgumentParser):
    """Errors are one message without a usage dump; exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"lit-lora: error\n{message}", file=sys.stderr)
        self.exit(2)


def run_tool(function: Callable[..., Any] | dict[str, Any], arguments: list[str], prog: str, **options: Any) -> Any:
    """Call a typed function, or one of several, with what the command line says; ``options`` are the parser's."""
    return auto_cli(function, args=arguments, prog=prog, parser_class=ToolParser, as_positional=True, **options)
