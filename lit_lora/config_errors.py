"""Errors of the config in one sentence each, in place of jsonargparse's lists of types."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from inspect import Parameter, isabstract, isclass, signature
from typing import Any

import peft
from jsonargparse import Namespace
from jsonargparse._util import import_object
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import lit_lora
from lit_lora.config_files import TO_BEGIN
from lit_lora.lazy import public_names

_ADVICE = {
    r"^argument --data: expected one argument": "write a class, as in --data WebDatasetDataModule; its options are in the help "
    "of lit-lora fit --data.help CLASS and in docs/config.md",
    r"^Unrecognized arguments: --\w+\.help": "for the help of a class within another one, name the other one first, as in --data "
    "WebDatasetDataModule --data.decoder.help ImageDecoder",
    r"No module named 'bitsandbytes": 'pip install "lit_lora[quant]", or use torch.optim.AdamW',
    r"No module named 'torchao": 'pip install "lit_lora[torchao]", or use torch.optim.AdamW',
    r"'train_sets' is not accepted": "several sets are for WebDatasetDataModule, which plans from indexes how often a pass shows "
    "each of them, also of remote shards; a stream of shards of unknown length has no passes",
    r"lit_lora\.quantization\.base\.Quantization": "quantizations are Int8, W8A8, FP8, NF4 and Dense",
    r"No supported gpu backend|accelerator is not available": "leave trainer.accelerator out, or set it to auto, which trains on "
    "the device that this machine has",
    r"^Unrecognized arguments": "lit-lora COMMAND --help shows all options",
    r"path string: PriorPreservation$": "PriorPreservation belongs to an objective, as its prior",
}
"""Advice to add to errors that match a pattern."""

_NO_CAUSES = ("Expected a <class", "Does not validate against any of the Union")
"""Beginnings of those entries in jsonargparse's list of errors that only name a type which the value does not have."""

_HOW_TO_WRITE = ("Not a valid subclass of", "a class path (str)", "a dict with")
"""Beginnings of those that list the ways to write a class."""

_REQUIRED = re.compile(r"Option '(?:(?:fit|validate|test|predict)\.)?([\w.]+)' is required but not provided")
_TWICE = re.compile(r"more than one stateful callback of type `(\w+)`")
_KEY = re.compile(r'^(?:Parser key "([^"]+)"|(--[\w.]+\.help)):')
_NO_CLASS = re.compile(r"Expected a dot import path string: ([\w.]*\b[A-Z]\w*)\s*$", re.MULTILINE)
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_AMBIGUOUS = re.compile(
    r"Multiple subclasses with name (\w+)\. Give the full class path to avoid ambiguity: ([\w., ]+)\."
)
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")
_WANTED = re.compile(r"<class '((?:lit_lora|peft)\.[\w.]+)'>")
_TYPE = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>|\b(list\[\w+\])")
_CHOICES = re.compile(r"Literal\[([^\]]*)\]")
_MODULES = ("torch.optim", "torch.optim.lr_scheduler", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
"""Modules with classes that configs name, besides those of lit_lora and PEFT."""


def explain(message: str) -> str:
    """Say in one sentence what jsonargparse found wrong; messages of other kinds stay as they are.

    Args:
        message: Message of jsonargparse about one key of the config.
    """
    if required := _REQUIRED.match(message):
        return f"{required[1]} is not given; give it in a config, such as --config configs/sd15.yaml; {TO_BEGIN}"
    advice = "".join(f"\n{advice}" for pattern, advice in _ADVICE.items() if re.search(pattern, message, re.MULTILINE))
    key = _KEY.search(message)
    if key is None or message.count("Parser key") > 1:
        return message + advice
    reason = _missing(message) or _wrong_value(message)
    return (f"{key[1] or key[2]}: {reason}" if reason else message) + advice


def reasons(message: str) -> str:
    """The causes in a jsonargparse error, without the types that do not match and without the value.

    jsonargparse nests such lists for nested options. The value is left out because it may hold URLs with credentials.
    """
    _, found, errors = message.partition("\nErrors:\n")
    reasons = re.split(r"^\s*- ", errors.partition("\nGiven value")[0], flags=re.MULTILINE)[1:] if found else []
    causes = [re.split(r"\n\s*Given value", reason)[0].strip() for reason in reasons]
    told = [cause for cause in causes if not cause.startswith(_NO_CAUSES)]
    # An option that a class refuses is followed by the ways to write a class, as if it were none.
    return "\n".join([cause for cause in told if not cause.startswith(_HOW_TO_WRITE)] or told)


def two_of_a_kind(message: str) -> str | None:
    """Say in one sentence that two callbacks have one entry in checkpoints; None if that is not what the message says.

    Args:
        message: Message of Lightning's trainer about its callbacks.
    """
    if (found := _TWICE.search(message)) is None:
        return None
    return (
        f"trainer.callbacks has two {found[1]} whose states checkpoints could not tell apart; remove one of them from the config "
        f"or the command line"
    )


def null_options(config: Any, path: str = "") -> list[str]:
    """Paths of options that are null in a config, although their classes have defaults for them.

    Args:
        config: Parsed config, or a part of it.
        path: Path of the part. Defaults to "", the whole config.
    """
    if isinstance(config, list):
        return [found for entry in config for found in null_options(entry, path)]
    if not isinstance(config, Namespace):
        return []
    parts = {name: config[name] for name in vars(config)}
    found = [entry for name, part in parts.items() for entry in null_options(part, f"{path}.{name}".lstrip("."))]
    if "class_path" in parts and isinstance(parts.get("init_args"), Namespace):
        parameters = signature(import_object(parts["class_path"])).parameters
        for name, value in vars(parts["init_args"]).items():
            default = parameters[name].default if name in parameters else None
            if value is None and default not in (None, Parameter.empty):
                found.append(f"{path}.init_args.{name}".lstrip("."))
    return found


def _missing(message: str) -> str | None:
    """A class or module that does not exist, or that several modules have."""
    if found := _AMBIGUOUS.search(message):
        return f"several classes are named {found[1]}; write one of {found[2]}"
    if found := _NO_ATTRIBUTE.search(message):
        module, name = found.groups()
        return f"{module} has no {name}{_suggestion(name, _classes_of(module))}"
    if found := _NO_MODULE.search(message):
        return f"there is no module {found[1]}; install it, or correct the path of the class"
    if found := _NO_CLASS.search(message):
        known = {*public_names(), *(config.__name__ for config in PEFT_TYPE_TO_CONFIG_MAPPING.values())}
        if (wanted := _WANTED.search(_expected(message))) and found[1] in known:
            fitting = _derived(import_object(wanted[1]), sorted(known))
            return f"{found[1]} is no {wanted[1].rpartition('.')[2]}; choose from {', '.join(fitting)}"
        return f"there is no class {found[1]}{_suggestion(found[1], known.union(*map(_classes_of, _MODULES)))}"
    return None


def _wrong_value(message: str) -> str | None:
    """A value that has none of the types that a key takes."""
    value = message.rpartition("Given value: " if "Given value: " in message else "Got value: ")[2].strip()
    types = sorted(
        {*map("".join, _TYPE.findall(_expected(message)))} - {"NoneType"},
        key=lambda name: ("[" in name, name[0].isupper(), name),
    )
    choices = [choice.strip(" '") for listed in _CHOICES.findall(message) for choice in listed.split(",")]
    if value == message.strip() or not (types or choices):
        return None
    if choices:
        return f"{value!r} is none of {', '.join(dict.fromkeys(choices))}"
    return f"{value!r} is not {'an' if types[0][0] in 'aeiouAEIOU' else 'a'} {' or '.join(types)}"


def _expected(message: str) -> str:
    """The part of a message that lists types that would fit."""
    _, listed, types = message.partition("Subtypes: [")
    return types.partition("\n")[0] if listed else message.partition("Got value: ")[0]


def _suggestion(name: str, known: set[str]) -> str:
    close = get_close_matches(name.rpartition(".")[2], sorted(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else "; write the name of a class, with its module unless it is ours"


def _derived(kind: type[Any], names: Iterable[str]) -> list[str]:
    """Those of our and PEFT's names whose classes are of a kind, and can be made."""
    found = {name: getattr(lit_lora, name, None) or getattr(peft, name, None) for name in names}
    return [name for name, one in found.items() if isclass(one) and issubclass(one, kind) and not isabstract(one)]


def _classes_of(module: str) -> set[str]:
    return {name for name in dir(sys.modules.get(module)) if name[0].isupper()}
