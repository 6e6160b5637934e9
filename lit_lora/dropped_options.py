"""Options that are lost: of a class or a list that a later config replaces, or given before a config that sets them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lit_lora.config_files import config_values, given_configs, plain_path, shipped_config, value_paths


def dropped_options(arguments: Sequence[str], config: Namespace) -> list[str]:
    """A line for each option, or class in a list, that a config file gives and that is lost, or that a later config sets anew.

    jsonargparse drops without a word what the class of a later config or of the command line does not take, and keeps the rest:
    of ``LoraConfig(r=4, lora_alpha=4)`` followed by ``LoHaConfig``, r stays 4, and alpha becomes LoHa's default.

    Args:
        arguments: Options of a command that takes the options of ``fit``.
        config: The parsed config of trainer, model and data.
    """
    found: dict[str, None] = {}
    configs = {given: config_values(Path(shipped_config(given)), given) for given in given_configs(arguments)}
    for given, values in configs.items():
        for path, value, kind in _dropped(values, config, ""):
            found[f"{path}={value!r} of {given} has no effect, since {kind} has no such option"] = None
        for path, lost in _replaced(values, config, ""):
            found[f"{path} of {given}: {lost} left out, since a later list replaces it; {path}+ adds to it"] = None
    return [*found, *_given_before(arguments, configs)]


def _given_before(arguments: Sequence[str], configs: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each option of the command line that a config after it sets, too: the later one counts."""
    for place, argument in enumerate(arguments):
        name = plain_path(argument.partition("=")[0].removeprefix("--").rstrip("+"))
        if not argument.startswith("--") or name == "config":
            continue
        for given in given_configs(arguments[place:]):
            if any(path == name or path.startswith(f"{name}.") for path in value_paths(configs[given])):
                yield f"{argument.partition('=')[0]} has no effect, since {given} sets it after it; give it after --config"


def _replaced(given: Any, parsed: Any, path: str) -> Iterator[tuple[str, str]]:
    """Path and classes of each list that is given, in whose place others were given, and not an empty one."""
    if isinstance(given, list) and parsed:
        # Lightning's options take a single object in place of a list, too.
        there = {_class_name(entry) for entry in (parsed if isinstance(parsed, list) else [parsed])}
        lost = [name for name in map(_class_name, given) if name and name not in there]
        if lost:
            yield path, f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'}"
    elif isinstance(given, Mapping) and isinstance(parsed, Namespace):
        for key, value in given.items():
            name = str(key).rstrip("+")
            yield from _replaced(value, parsed.get(name), f"{path}.{name}".lstrip("."))


def _class_name(entry: Any) -> str:
    """Name of the class that an entry of a list gives; empty if it gives none."""
    given = isinstance(entry, Mapping | Namespace) and entry.get("class_path")
    return str(given or "").rpartition(".")[2]


def _dropped(given: Any, parsed: Any, path: str) -> Iterator[tuple[str, Any, str]]:
    """Path and value of each option that is given and not there, and the class that does not have it."""
    if not isinstance(given, Mapping) or not isinstance(parsed, Namespace):
        return  # a whole part, or a list, was replaced
    options = parsed.get("init_args") if "class_path" in parsed else None
    for key, value in given.items():
        name, _, rest = str(key).rstrip("+").partition(".")
        here, inner = f"{path}.{name}".lstrip("."), {rest: value} if rest else value
        if name in vars(parsed):
            if name == "init_args" and options is not None:
                yield from _missing(inner, options, here, parsed["class_path"])
            yield from _dropped(inner, parsed[name], here)
        elif isinstance(options, Namespace):  # the names of init_args may be left out
            yield from _missing({name: inner}, options, path, parsed["class_path"])
            yield from _dropped(inner, options.get(name), here)


def _missing(given: Any, options: Namespace, path: str, kind: str) -> Iterator[tuple[str, Any, str]]:
    for key, value in given.items() if isinstance(given, Mapping) else ():
        name = str(key).rstrip("+").partition(".")[0]
        if name not in vars(options):
            yield f"{path}.{name}", value, kind.rpartition(".")[2]
