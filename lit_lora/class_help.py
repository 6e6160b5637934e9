"""Help of a class that the config names, or that is an option of such a class: ``--data.buckets.help``.

jsonargparse asks for the name of the class, and finds no option of a class within another one but by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from importlib import import_module
from inspect import isclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse._util import get_import_path, import_object

from lit_lora.config_errors import CLASS_MODULES
from lit_lora.config_files import config_values, given_configs
from lit_lora.config_parser import Parser

_DEFAULTS = {"data": "WebDatasetDataModule", "data.decoder": "ImageDecoder"}
"""Classes that are meant where neither options nor configs name one."""


def with_named_class(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, with the class whose help they ask for, if configs or options name it.

    The help of an option of such a class, which the command's own parser does not find, is printed here, and ends the process.

    Args:
        arguments: Options of a command that takes the options of ``fit``.

    Raises:
        SystemExit: After a help is printed, with status 0.
    """
    arguments = list(arguments)
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if not (option.startswith("--") and option.endswith(".help")):
            continue
        following = "".join(arguments[place + 1 : place + 2])
        value = value or ("" if following.startswith("-") else following)
        path = option.removeprefix("--").removesuffix(".help")
        if not value and (own := _class_of(path, arguments)):
            value = get_import_path(own) or ""
            # Last, since it prints the help at once, and the options after it may be those that make the class known.
            arguments = [*arguments[:place], *arguments[place + 1 :], f"{option}={value}"]
        _print_help_of_option(option, value, arguments)
    return arguments


def _print_help_of_option(option: str, value: str, arguments: Sequence[str]) -> None:
    names = option.removeprefix("--").split(".")[:-1]
    for end in range(len(names) - 1, 0, -1):
        outer = ".".join(names[:end])
        if owner := _class_of(outer, arguments):
            parser = Parser()
            parser.add_class_arguments(owner, outer)
            if option not in parser._option_string_actions:
                _print_help_of_part(owner, outer, names[end:])
            parser.parse_args([option, *filter(None, [value])])


def _print_help_of_part(owner: type[Any], path: str, names: Sequence[str]) -> None:
    """Print the help of a dataclass within a class, whose options the parser has one by one; others are left to it."""
    part: Any = owner
    for name in names:
        outer, part = part, None
        with suppress(NameError):  # a type that is imported for type checkers alone
            part = get_type_hints(outer.__init__).get(name)
        part = next((one for one in get_args(part) if isclass(one) and one is not type(None)), part)
        path = f"{path}.{name}"
    if isclass(part) and is_dataclass(part):
        parser = Parser(add_help=False, description=f"Help for --{path}.help={get_import_path(part)}")
        parser.add_class_arguments(part, path)
        parser.print_help()
        parser.exit()


def _class_of(path: str, arguments: Sequence[str]) -> type[Any] | None:
    """The class that an option has; None if none is named, or there is no such class, which the parser tells."""
    name = next(_named(path, arguments), _DEFAULTS.get(path, ""))
    if "." in name:
        with suppress(ImportError, AttributeError, ValueError):
            found = import_object(name)
            return found if isclass(found) else None
    return next((found for found in _classes_named(name) if isclass(found)), None)


def _classes_named(name: str) -> Iterator[Any]:
    return (getattr(import_module(module), name, None) for module in CLASS_MODULES if name)


def _named(path: str, arguments: Sequence[str]) -> Iterator[str]:
    """Names of an option's class on the command line and in configs, the last ones first."""
    for argument, following in reversed(list(zip_longest(arguments, arguments[1:], fillvalue=""))):
        option, equals, value = argument.partition("=")
        if option.replace(".init_args", "") in (f"--{path}", f"--{path}.class_path"):
            yield value if equals else following
    for given in reversed(list(given_configs(arguments))):
        part: Any = config_values(Path(given), given)
        for name in path.split("."):
            options = part.get("init_args", part) if isinstance(part, dict) else {}
            part = options.get(name)
        if isinstance(part, dict):
            part = part.get("class_path")
        if isinstance(part, str):
            yield part
