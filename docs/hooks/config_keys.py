"""MkDocs hook: the tables of ``config.md``, made from signatures and docstrings, and Sphinx roles as plain code.

``python docs/hooks/config_keys.py`` prints the tables.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unicodedata import lookup

import torch
from docstring_parser import DocstringStyle, parse
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from peft import PeftConfig

import lit_lora
from lit_lora.lazy import public_names

MARKER = "<!-- config keys -->"
"""The line of a page that the tables replace."""


@dataclass(frozen=True)
class Section:
    """A part of the page: one key, which takes the options of a class or a choice of classes.

    Args:
        key: The config key.
        description: What it is for.
        options: The class whose options the key takes directly.
        choice: Otherwise the base of the classes that its ``class_path`` may name.
    """

    key: str
    description: str
    options: type[Any] | None = None
    choice: type[Any] | None = None


SECTIONS = (
    Section("model", "The module, always `LoraDiffusion`.", options=lit_lora.LoraDiffusion),
    Section("model.family", "The kind of base model and where its weights are.", choice=lit_lora.ModelFamily),
    Section("model.adapter", "A PEFT config such as `LoraConfig`, or this class.", choice=PeftConfig),
    Section(
        "model.base_adapters[]",
        "A list of adapters that are merged into the base, so that the new one is trained over them.",
        options=lit_lora.BaseAdapter,
    ),
    Section("model.objective", "What is drawn for a step and what the loss is.", choice=lit_lora.Objective),
    Section("model.objective.init_args.density", "Times of `FlowMatching`.", choice=lit_lora.TimestepDensity),
    Section(
        "model.objective.init_args.weighting",
        "Weights of the samples by their noise levels; `SigmaSqrt` and `CosMapWeighting` are for `FlowMatching`, the others for "
        "`DDPM`.",
        choice=lit_lora.Weighting,
    ),
    Section("model.objective.init_args.criterion", "How much an error counts.", choice=lit_lora.Criterion),
    Section("model.objective.init_args.noise[]", "A list of changes of the noise.", choice=lit_lora.NoiseKind),
    Section("model.objective.init_args.prior", "Class images of DreamBooth.", choice=lit_lora.PriorPreservation),
    Section("model.objective.init_args.contrast", "Contrast of `FlowMatching`.", choice=lit_lora.Contrast),
    Section("model.quantization", "How the frozen weights are stored.", choice=lit_lora.Quantization),
    Section(
        "model.parameter_groups[]",
        "A list of groups of trained parameters with settings of their own; the first group that matches counts.",
        options=lit_lora.ParameterGroup,
    ),
    Section("model.memory", "Options that trade time or exactness for memory.", options=lit_lora.MemoryOptions),
    Section("model.sampling", "How `lit-lora predict` draws images.", options=lit_lora.SamplingOptions),
    Section("data", "The datamodule.", choice=LightningDataModule),
    Section(
        "data.init_args.train_sets[]",
        "A list of sets of shards, each with its own repeats and captions.",
        options=lit_lora.ShardSet,
    ),
    Section("data.init_args.buckets", "Image sizes by aspect ratio.", options=lit_lora.AspectRatioBuckets),
    Section("data.init_args.decoder", "How a sample becomes an entry of a batch.", choice=lit_lora.SampleDecoder),
    Section("data.init_args.decoder.init_args.captions", "Captions of `ImageDecoder`.", options=lit_lora.Captions),
    Section(
        "data.init_args.decoder.init_args.captions.sources[]",
        "A list of places where a caption may be.",
        options=lit_lora.CaptionSource,
    ),
    Section("data.init_args.chunks", "How training goes through the shards.", options=lit_lora.Chunks),
    Section("data.init_args.chunks.staging", "Copies of the shards on a local disk.", options=lit_lora.Staging),
    Section("trainer.logger[]", "One logger or a list of them.", choice=Logger),
    Section("trainer.callbacks[]", "Each entry of the list is one callback.", choice=Callback),
    Section(
        "trainer.callbacks[].init_args.info",
        "What `AdapterCheckpoint` writes about an adapter.",
        options=lit_lora.AdapterInfo,
    ),
    Section("trainer.plugins[]", "Each entry of the list is one plugin.", choice=CheckpointIO),
    Section("trainer.strategy", "How several GPUs work together.", choice=Strategy),
)
"""All sections, in the order of the page."""

_ROLE = re.compile(r":(?:class|meth|func|attr|data|exc|mod):(`|<code>)~?([^`<]+)(`|</code>)")
_MATH = re.compile(r":math:(`|<code>)([^`<]+)(`|</code>)")
_PLAIN = {
    str: "text",
    Path: "text",
    bool: r"true \| false",
    int: "integer",
    float: "number",
    type(None): "null",
}


@dataclass(frozen=True)
class Key:
    """A config key: name, type, default and meaning, as Markdown."""

    name: str
    type: str
    default: str
    meaning: str


def public_classes() -> dict[str, type[Any]]:
    """The public classes of the package by name."""
    return {name: getattr(import_module(module), name) for name, module in public_names().items()}


def classes_of(section: Section) -> list[type[Any]]:
    """The classes that a section describes."""
    if section.options is not None:
        return [section.options]
    assert section.choice is not None
    return [one for one in public_classes().values() if issubclass(one, section.choice) and not inspect.isabstract(one)]


def keys_of(one: type[Any]) -> list[Key]:
    """The options of a class, which are its constructor's arguments.

    Raises:
        LookupError: If an argument has no description in the docstring.
    """
    described = {
        parameter.arg_name: parameter.description or ""
        for parameter in parse(inspect.getdoc(one) or "", DocstringStyle.GOOGLE).params
    }
    hints = get_type_hints(one.__init__)
    keys = []
    for name, parameter in inspect.signature(one).parameters.items():
        if name.startswith("_") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not described.get(name):
            raise LookupError(f"{one.__name__} does not describe its argument {name}")
        meaning = re.sub(r"\s+", " ", plain(described[name].replace("``", "`")))
        default = "required" if parameter.default is parameter.empty else _default(one, parameter)
        keys.append(Key(name, _type(hints[name]), default, meaning.replace("|", r"\|")))
    if "options" in inspect.signature(one).parameters:  # those of the base
        base = next(kind for kind in one.__mro__[1:] if "__init__" in vars(kind))
        keys += [key for key in keys_of(base) if key.name not in {own.name for own in keys}]
    return keys


def reference() -> str:
    """The tables of all sections, as Markdown."""
    return "\n".join(_lines())


def plain(text: str) -> str:
    """Text with Sphinx roles as code, in Markdown or HTML: ``:class:`~a.B``` is ``B``, and formulas have Greek letters."""
    text = _ROLE.sub(lambda role: role[1] + role[2].rpartition(".")[2] + role[3], text)
    return _MATH.sub(lambda formula: formula[1] + _readable(formula[2]) + formula[3], text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for each page before it becomes HTML."""
    return markdown.replace(MARKER, reference()) if MARKER in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """MkDocs calls this for each page; docstrings of the reference have roles."""
    return plain(html)


def _lines() -> Iterator[str]:
    for section in SECTIONS:
        yield f"\n## `{section.key}`\n\n{section.description}"
        if section.options is not None:
            yield from _table(section.options)
            continue
        yield f"`class_path` names one of these classes or one of your own; the keys are those under `{section.key}.init_args`."
        for one in classes_of(section):
            yield f"\n### `{one.__name__}`\n\n{_summary(one)}"
            yield from _table(one)


def _table(one: type[Any]) -> Iterator[str]:
    keys = keys_of(one)
    if "kwargs" in inspect.signature(one).parameters:
        yield f"\nThe options of Lightning's `{one.__bases__[0].__name__}`, and:"
    if not keys:
        yield "\nNo options."
        return
    yield "\n| key | type | default | meaning |\n|---|---|---|---|"
    for key in keys:
        yield f"| `{key.name}` | {key.type} | {key.default} | {key.meaning} |"


def _summary(one: type[Any]) -> str:
    text = parse(inspect.getdoc(one) or "", DocstringStyle.GOOGLE).short_description or ""
    return re.sub(r"\s+", " ", plain(text.replace("``", "`")))


def _type(hint: Any) -> str:
    """A type in the words of a config."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return r" \| ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        last = sorted(parts, key=lambda part: part is type(None))
        return r" \| ".join(dict.fromkeys(map(_type, last)))
    if origin in (list, Sequence):
        return f"list of {_type(parts[0])}"
    if origin is tuple:
        return f"list of {len(parts)} values: {', '.join(map(_type, parts))}"
    if origin is not None:
        return {dict: "mapping", Callable: "class"}[origin]
    return _PLAIN.get(hint, f"`{hint.__name__}`")


def _default(one: type[Any], parameter: inspect.Parameter) -> str:
    """A default as a config would write it."""
    value = parameter.default
    if inspect.isfunction(value):  # makes an optimizer
        optimizer = value([torch.zeros(1, requires_grad=True)])
        return f"`{type(optimizer).__name__}` with `lr: {optimizer.defaults['lr']}`"
    if repr(value) == "<factory>":
        made = next(field for field in fields(one) if field.name == parameter.name).default_factory()
        return (
            "`" + ", ".join(f"{{{key}: {entry[key]}}}" for entry in map(asdict, made) for key in list(entry)[:1]) + "`"
        )
    if is_dataclass(value) or isinstance(value, lit_lora.TimestepDensity):
        return f"`{type(value).__name__}`"
    return f"`{json.dumps(value, default=str)}`"


def _readable(formula: str) -> str:
    """A formula in TeX with Unicode letters and roots in place of commands, and without braces."""
    formula = re.sub(r"\\bar\s*\\([a-z]+)", lambda name: f"{_letter(name[1])}\u0305", formula)
    formula = re.sub(r"\\sqrt\{((?:[^{}]|\{[^{}]*\})*)\}", r"√(\1)", formula)
    formula = re.sub(r"\\([a-z]+)", lambda name: _letter(name[1]), formula)
    return formula.replace("{", "").replace("}", "")


def _letter(name: str) -> str:
    """A Greek letter; the build fails for a command that is none."""
    return lookup(f"GREEK SMALL LETTER {'lamda' if name == 'lambda' else name}")  # Unicode's spelling


if __name__ == "__main__":
    print(reference())
