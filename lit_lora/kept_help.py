"""Help of the commands, kept between calls: its text takes a second of imports and parsers, and hardly ever changes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from lit_lora.files import atomic_file

_VARIABLES = ("JSONARGPARSE_", "PYTHON_COLORS", "NO_COLOR", "FORCE_COLOR", "LANG", "LC_", "HF_", "LIT_LORA")
"""Beginnings of the environment variables that may change a help text."""

_MOST = 64
"""Texts that are kept; there is one for each command and width of the terminal."""


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the arguments of a process are a command, perhaps its subcommand, and ``--help`` or ``-h``."""
    *command, last = arguments
    return last in ("-h", "--help") and 1 <= len(command) <= 2 and not any(part.startswith("-") for part in command)


def print_help(arguments: Sequence[str], command: Callable[[], Any]) -> int:
    """Print the help of a command from the user's cache folder, or have the command print it, and keep it.

    A kept text is shown only while it is certainly the same: with the same arguments, width of the terminal, interpreter and
    environment, and as long as every file that Python read for it, and every folder in which it looks for packages, is
    unchanged. Where the cache folder cannot be read or written, nothing is kept.

    Args:
        arguments: Command and its options, for which :func:`asks_for_help` is true.
        command: Prints the help and ends with :class:`SystemExit`, as argparse does.

    Returns:
        Exit status of the command.
    """
    path = _path(arguments)
    text = None if path is None else _kept(path)
    if text is not None:
        print(text, end="")
        return 0
    with redirect_stdout(io.StringIO()) as output:
        status = _status(command)
    print(output.getvalue(), end="")
    if path is not None and status == 0:
        _keep(path, output.getvalue())
    return status


def _status(command: Callable[[], Any]) -> int:
    try:
        return int(command() or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)


def _path(arguments: Sequence[str]) -> Path | None:
    """File that keeps a text; None if the user has no cache folder."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    variables = sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))
    width = shutil.get_terminal_size().columns
    stated = json.dumps([list(arguments), width, sys.version, sys.prefix, sys.path, variables])
    return root / "lit_lora" / "help" / f"{hashlib.sha256(stated.encode()).hexdigest()[:32]}.json"


def _kept(path: Path) -> str | None:
    """The kept text; None if there is none, or something has changed since."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        text, files = str(kept["text"]), dict(kept["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if files == _states(files) else None


def _keep(path: Path, text: str) -> None:
    modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = [*filter(None, modules), *(folder or os.curdir for folder in sys.path), str(_names())]
    # What cannot be written is made again at the next call.
    with suppress(OSError, ValueError):
        states = _states(files)
        with atomic_file(path) as part:
            part.write_text(json.dumps({"text": text, "files": states}), encoding="utf-8")
        for old in sorted(path.parent.glob("*.json"), key=lambda one: -one.stat().st_mtime_ns)[_MOST:]:
            old.unlink()


def _names() -> Path:
    """The list of public names, which is read but not imported."""
    return Path(__file__).with_name("__init__.pyi")


def _states(paths: Iterable[str]) -> dict[str, list[int] | None]:
    """Time of the last change and size of each file or folder; None for one that is not there."""
    states: dict[str, list[int] | None] = {}
    for path in paths:
        try:
            found = os.stat(path)
        except OSError:
            states[path] = None
        else:
            states[path] = [found.st_mtime_ns, found.st_size]
    return states
