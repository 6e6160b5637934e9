"""Checks of config files that need none of the libraries, so that a mistake is told at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from lit_lora.errors import UserError
from lit_lora.option_names import advice_for, no_option
from lit_lora.source_options import Option, options_of, source_of
from lit_lora.unique_keys import check_unique_keys

_EVERYWHERE = {"config", "seed_everything", "trainer", "model", "data", "must_resume"}
"""Keys of a config beside the options of the trainer's method."""

_OF_COMMAND_LINE = {"help", "print_config"}
"""Options that a file cannot have."""

ALL_OPTIONS = "lit-lora COMMAND --help lists all options"

TO_BEGIN = "lit-lora train FOLDER --base sd15 makes a config for a folder of images, and trains"
"""What to do without a config."""


def check_config_files(arguments: Sequence[str], method: str | None = None) -> None:
    """Refuse configs that do not exist, have unknown keys or words for numbers; everything else is left to the parser.

    Args:
        arguments: Options of a command that takes the options of ``fit``.
        method: Method of the trainer that the command runs; defaults to None, for a command with options of its own.

    Raises:
        UserError: If a file does not exist or gives a key twice, or the trainer or the module has no such option, or none
            that can have such a value.
    """
    known = _known_options(method)
    for given in given_configs(arguments):
        path = Path(shipped_config(given))
        values = config_values(path, given)
        _check_parts(given, values)
        for part in known:
            _check_keys(given, part, values.get(part) if part else values, known)


def check_options(arguments: Sequence[str], method: str | None = None) -> None:
    """Refuse options of the command line that do not exist, and values, as :func:`check_config_files` does for those of files.

    Args:
        arguments: See :func:`check_config_files`.
        method: See :func:`check_config_files`.

    Raises:
        UserError: If neither the command nor its trainer or module has such an option, or it cannot have such a value.
    """
    known = _known_options(method)
    if "" in known:
        known[""] |= dict.fromkeys(_OF_COMMAND_LINE)
    paths = _paths(known)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        given = name.removeprefix("--").rstrip("+")
        if not argument.startswith("--") or not given:
            continue
        first, *inside = given.split(".")
        for part, name in [("", first), *((first, second) for second in inside[:1])]:
            options = known.get(part)
            # The beginning of a name stands for the whole one.
            if options and not any(option.startswith(name) for option in options):
                otherwise = advice_for(f"{part}.{name}".lstrip("."), paths, "--") or ALL_OPTIONS
                raise UserError(no_option(given, paths, otherwise, "--"))
        part, _, option = given.rpartition(".")
        possible = known.get(part, {}).get(option)
        word = value if equals else following
        if possible and not word.startswith("--") and (why := possible.refuse(_read(word))):
            raise UserError(f"--{given}: {why}")


def _read(text: str) -> Any:
    """A value of the command line, as a config file would have it."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def check_config_given(arguments: Sequence[str], command: str) -> None:
    """Refuse a command that has neither a config nor options of the model or the data, and say what to type.

    Args:
        arguments: Options of a command that takes the options of ``fit``.
        command: The command, such as ``fit`` or ``shards plan``.

    Raises:
        UserError: If there is nothing to run.
    """
    if arguments[-1:] in (["-c"], ["--config"]):
        raise UserError(f"--config needs the path of a file, such as lit-lora {command} --config configs/sd15.yaml")
    if any(argument.partition("=")[0].endswith((".help", "--help")) or argument == "-h" for argument in arguments):
        return
    if not any(
        argument.startswith(("-c", "--config", "--model", "--data", "--print_config")) for argument in arguments
    ):
        file = next((one for one in arguments if one.endswith((".yaml", ".yml"))), "configs/sd15.yaml")
        raise UserError(f"--config is missing, such as lit-lora {command} --config {file}; {TO_BEGIN}")


def shipped_config(argument: str) -> str:
    """The config that ships with the package, for a path such as ``configs/sd15.yaml`` that does not exist."""
    path = Path(argument)
    if "configs" not in path.parts or path.exists():
        return argument
    below = path.parts[len(path.parts) - path.parts[::-1].index("configs") :]
    shipped = _shipped_folder().joinpath(*below)
    return str(shipped) if shipped.is_file() else argument


def _shipped_folder() -> Path:
    return Path(str(files("lit_lora.configs")))


def given_configs(arguments: Sequence[str]) -> Iterator[str]:
    """The values of ``--config``, in their order."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name in ("-c", "--config") and (equals or following):
            yield value if equals else following


def config_values(path: Path, given: str) -> dict[str, Any]:
    """Content of a config; empty if only the parser can tell what is wrong with it.

    Args:
        path: Path of the file.
        given: What the user has written, which may be the content itself.

    Raises:
        UserError: If there is no such file, it is a folder, or it gives a key twice.
    """
    import yaml

    if path.is_dir():
        inside = sorted(path.glob("*.y*ml"), key=lambda file: (file.name != "config.yaml", file.name))
        example = inside[0] if inside else "configs/sd15.yaml"
        raise UserError(f"--config {given} is a folder; name a YAML file, such as {example}")
    try:
        # A config may be given as text in place of a file.
        text = path.read_text(encoding="utf-8") if path.exists() else given
        read = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    try:
        check_unique_keys(text)
    except ValueError as error:
        raise UserError(f"{given}: {error}") from error
    if isinstance(read, str) and not path.exists():
        raise UserError(f"--config {given}: there is no such file{_similar(given)}")
    return read if isinstance(read, dict) else {}


def _similar(given: str) -> str:
    """Files beside the one that is missing, or the configs that ship with the package, as advice."""
    folder = _shipped_folder()
    shipped = [f"configs/{path.relative_to(folder)}" for path in sorted(folder.rglob("*.yaml"))]
    beside = [str(path) for path in sorted(Path(given).parent.glob("*.y*ml"))]
    close = get_close_matches(given, [*beside, *shipped], n=1)
    return (
        f"; did you mean {close[0]}?" if close else "; give the path of a YAML file, or one such as configs/sd15.yaml"
    )


def _check_keys(given: str, part: str, values: Any, known: Known) -> None:
    """Refuse keys of a part that are not known; nothing is known of one that is not a mapping or names a class."""
    if not isinstance(values, dict) or "class_path" in values or not known[part]:
        return
    for key in values:
        # A key may be a path, such as model.family, and may end in + to extend a list.
        name = str(key).partition(".")[0].rstrip("+")
        if name not in known[part]:
            path = f"{part}.{name}".lstrip(".")
            raise UserError(f"{given}: {no_option(path, _paths(known), ALL_OPTIONS)}")
        possible = known[part].get(str(key))
        if possible and (why := possible.refuse(values[key])):
            raise UserError(f"{given}: {f'{part}.{key}'.lstrip('.')}: {why}")


def _check_parts(given: str, values: dict[str, Any]) -> None:
    """Refuse parts without options, which would drop those of earlier configs, and keys given as a path and as mappings."""
    for part in ("trainer", "model", "data"):
        if part in values and values[part] is None:
            raise UserError(
                f"{given} has {part} without options, which drops all those of configs before it; leave out {part}"
            )
    paths = [path for path in value_paths(values) if path]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(
            f"{given}: {twice} is given twice, as a path and as mappings, and only one would count; give it once"
        )


def value_paths(values: Any, path: str = "") -> Iterator[str]:
    """Paths of all values inside mappings, as :func:`plain_path` writes them."""
    if not isinstance(values, dict) or not values:
        yield path
        return
    for key, value in values.items():
        yield from value_paths(value, plain_path(f"{path}.{key}"))


def plain_path(path: str) -> str:
    """The path of an option without names of ``init_args``, which may be left out."""
    return ".".join(name for name in path.split(".") if name not in ("", "init_args"))


Known = Mapping[str, Mapping[str, Option | None]]
"""Options by the part of the config that they are in; None for those of the command, whose types are not known."""


def _known_options(method: str | None) -> dict[str, dict[str, Option | None]]:
    """Options of the trainer and of the module, and without a part those of the trainer's method, if there is one."""
    module = options_of(Path(__file__).with_name("module.py"), "LoraDiffusion")
    parts: dict[str, dict[str, Option | None]] = {"trainer": {**_options_of_trainer("__init__")}, "model": {**module}}
    if method is None or not (own := _options_of_trainer(method)):
        return parts
    return {"": dict.fromkeys(_EVERYWHERE) | own, **parts}


def _paths(known: Known) -> set[str]:
    return {f"{part}.{option}".lstrip(".") for part, options in known.items() for option in options}


def _options_of_trainer(method: str) -> dict[str, Option]:
    source = source_of("lightning.pytorch.trainer.trainer")
    return options_of(source, "Trainer", method) if source else {}
