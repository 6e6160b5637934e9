"""Errors of the config in one sentence each, in place of jsonargparse's lists of types."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from inspect import Parameter, isabstract, isclass, signature
from typing import Any

import peft
from jsonargparse import Namespace
from jsonargparse._util import import_object
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import lit_lora
from lit_lora.config_files import ALL_OPTIONS, TO_BEGIN
from lit_lora.lazy import public_names
from lit_lora.option_names import in_full, no_option
from lit_lora.source_options import not_possible

_ADVICE = {
    r"^argument --data: expected one argument": "--data has no class, as in --data WebDatasetDataModule, or an option of it has "
    "no value; lit-lora fit --data.help and docs/config.md list its options",
    r"^argument --(?:model|data)\.[\w.]+(?<!\.help): expected one argument": "it has no value; an option of a class needs the "
    "class first, as in --model.objective DDPM --model.objective.prior.weight 1",
    r"^argument --[\w.]+\.help: expected one argument": "write the name of a class after it; docs/config.md lists them",
    r"No module named 'bitsandbytes": 'pip install "lit_lora[quant]", or use torch.optim.AdamW',
    r"No module named 'torchao": 'pip install "lit_lora[torchao]", or use torch.optim.AdamW',
    r"'train_sets' is not accepted": "several sets are for WebDatasetDataModule, which plans from indexes how often a pass shows "
    "each of them, also of remote shards; a stream of shards of unknown length has no passes",
    r"lit_lora\.quantization\.base\.Quantization": "quantizations are Int8, W8A8, FP8, NF4 and Dense",
    r"No supported gpu backend|accelerator is not available": "leave trainer.accelerator out, or set it to auto, which trains on "
    "the device that this machine has, or to cpu",
    r"does not match the world size": "give trainer.devices the processes that torchrun or srun starts on each node "
    "(--nproc_per_node, --ntasks-per-node), and trainer.num_nodes the nodes",
    r"path string: PriorPreservation$": "PriorPreservation belongs to an objective, as its prior",
}
"""Advice to add to errors that match a pattern."""

_FEW = 16
"""Options of a class that fit into a sentence."""

_NO_CAUSES = ("Expected a <class", "Does not validate against any of the Union")
"""Beginnings of those entries in jsonargparse's list of errors that only name a type which the value does not have."""

_HOW_TO_WRITE = ("Not a valid subclass of", "a class path (str)", "a dict with")
"""Beginnings of those that list the ways to write a class."""

_REQUIRED = re.compile(r"Option '(?:(?:fit|validate|test|predict)\.)?([\w.]+)' is required but not provided")
_TWICE = re.compile(r"more than one stateful callback of type `(\w+)`")
_NO_OPTION = re.compile(
    r"(?:Unrecognized arguments: --([\w.]+)|(?:Subcommand '\w+' does not accept option '|Option '|Group ')([^']+))"
    r"(?:' is not accepted|' does not accept option '([\w.]+))?"
)
_NESTED = re.compile(r"""["']*NestedArg\(key='([\w.]+)', val='?(.*?)'?\)["']*$""")
_STRAY = re.compile(r"Unrecognized arguments: (?!--)(\S+)")
_KEY = re.compile(r'^(?:Parser key "([^"]+)"|(--[\w.]+\.help)):')
_NO_CLASS = re.compile(r"Expected a dot import path string: ([\w.]*\b[A-Z]\w*)\s*$", re.MULTILINE)
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_AMBIGUOUS = re.compile(
    r"Multiple subclasses with name (\w+)\. Give the full class path to avoid ambiguity: ([\w., ]+)\."
)
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")
_WANTED = re.compile(r"<class '((?:lit_lora|peft)\.[\w.]+)'>")
_TYPE = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>|\b((?:list|dict)\[[\w, |]+\])")
_CHOICES = re.compile(r"Literal\[((?:'[^']*'|[^\]'])*)\]")
_CHOICE = re.compile(r"[^', ](?:[^',]*[^', ])?")
_NO_PATH = re.compile(r"Expected a dot import path string: (\S+)\s*$", re.MULTILINE)
_NO_SUBCLASS = re.compile(r"Not a valid subclass of (\w+)\. Got value: (\S+)")
_MODULES = ("torch.optim", "torch.optim.lr_scheduler", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
"""Modules with classes that configs name, besides those of lit_lora and PEFT."""

CLASS_MODULES = ("lit_lora", "peft", *_MODULES)
"""Modules whose classes a config can name without the module."""


def explain(message: str, options: Iterable[str] = (), owner: str = "") -> str:
    """Say in one sentence what jsonargparse found wrong; messages of other kinds stay as they are.

    Args:
        message: Message of jsonargparse about one key of the config.
        options: Names of the options that there are. Defaults to none.
        owner: Class that has these options. Defaults to "", for the command itself.
    """
    advice = "".join(f"\n{advice}" for pattern, advice in _ADVICE.items() if re.search(pattern, message, re.MULTILINE))
    if told := _wrong_name(message, sorted(options), owner):
        return told + advice
    key = _KEY.search(message)
    if key is None or message.count("Parser key") > 1:
        return message + advice
    reason = _missing(message) or _wrong_value(message) or _no_class(message)
    name = key[1] or key[2]
    place = f"{name} of {owner}" if owner else name
    return (f"{place}: {reason}" if reason else message) + advice


def _wrong_name(message: str, options: Sequence[str], owner: str) -> str | None:
    """An option that is not given, not there, or not written in full."""
    if required := _REQUIRED.match(message):
        if owner:
            return f"{owner} needs {required[1]}, which is not given"
        return f"{required[1]} is not given; give it in a config, such as --config configs/sd15.yaml; {TO_BEGIN}"
    if stray := _STRAY.match(message):
        return f"{stray[1]!r} is neither an option nor follows one; {ALL_OPTIONS}"
    if told := in_full(message):
        return told
    if absent := _NO_OPTION.match(message):
        dashes = "--" if message.startswith("Unrecognized arguments: --") else ""
        return _no_option(".".join(filter(None, absent.groups())), options, owner, dashes)
    return None


def _no_option(path: str, options: Sequence[str], owner: str, dashes: str) -> str:
    """A sentence about an option that is not there."""
    if ":" in path:
        name, _, value = path.partition(":")
        return f"{path} is read as the name of an option; write a space after the colon, as in {name}: {value}"
    part = path.rpartition(".")[0]
    beside = [name for there, _, name in (option.rpartition(".") for option in options) if there == part]
    listed = f"the options there are {', '.join(beside)}" if 0 < len(beside) <= _FEW else None
    otherwise = "its documentation lists them" if owner else ALL_OPTIONS
    return no_option(path, options, listed or otherwise, "" if owner else dashes, owner)


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
        wanted = _WANTED.search(_expected(message))
        fitting = ", ".join(derived(import_object(wanted[1]), sorted(known))) if wanted else ""
        if wanted and found[1] in known:
            return f"{found[1]} is no {wanted[1].rpartition('.')[2]}; choose from {fitting}"
        return f"there is no class {found[1]}{_suggestion(found[1], known.union(*map(_classes_of, _MODULES)), fitting)}"
    return None


def _wrong_value(message: str) -> str | None:
    """A value that has none of the types that a key takes."""
    value = message.rpartition("Given value: " if "Given value: " in message else "Got value: ")[2].strip()
    value = _NESTED.sub(r"\1: \2", value)
    types = sorted(
        {*("".join(found).replace("Sequence", "list") for found in _TYPE.findall(_expected(message)))} - {"NoneType"},
        key=lambda name: ("[" in name, name[0].isupper(), name),
    )
    choices = [choice for listed in _CHOICES.findall(message) for choice in _CHOICE.findall(listed)]
    if value == message.strip() or not (types or choices):
        return None
    return not_possible(value, types, choices)


def _no_class(message: str) -> str | None:
    """A value in place of a class, such as the name of an optimizer in lower case."""
    if found := _NO_PATH.search(message):
        known = {name.lower(): name for name in sorted(set[str]().union(*map(_classes_of, _MODULES)))}
        close = get_close_matches(found[1].lower(), known, n=1, cutoff=0.75)
        advice = f"did you mean {known[close[0]]}?" if close else "write the name of one, such as torch.optim.AdamW"
        return f"{found[1]!r} is no class; {advice}"
    if found := _NO_SUBCLASS.search(message):
        return f"{found[2].replace('None', 'null')} is no {found[1]}; write the name of a class"
    return None


def _expected(message: str) -> str:
    """The part of a message that lists types that would fit."""
    _, listed, types = message.partition("Subtypes: [")
    return types.partition("\n")[0] if listed else message.partition("Got value: ")[0]


def _suggestion(name: str, known: set[str], fitting: str = "") -> str:
    if close := get_close_matches(name.rpartition(".")[2], sorted(known), n=1, cutoff=0.75):
        return f"; did you mean {close[0]}?"
    return f"; choose from {fitting}" if fitting else "; write the name of a class, with its module unless it is ours"


def derived(kind: type[Any], names: Iterable[str]) -> list[str]:
    """Those of our and PEFT's names whose classes are of a kind, and can be made."""
    found = {name: getattr(lit_lora, name, None) or getattr(peft, name, None) for name in names}
    return [name for name, one in found.items() if isclass(one) and issubclass(one, kind) and not isabstract(one)]


def _classes_of(module: str) -> set[str]:
    return {name for name in dir(sys.modules.get(module)) if name[0].isupper()}
