"""The base of a run, and the shipped config of its family."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lit_lora.embedded import NAME
from lit_lora.errors import UserError
from lit_lora.families import ModelSource, check_single_file, family_of_source
from lit_lora.tools.named_family import named_family

_OF_EMBEDDED = "demo"
"""The shipped config of the embedded base."""


@dataclass(frozen=True)
class Base:
    """The base of a run.

    Args:
        name: Short name, for the run's folder.
        template: Shipped config of the family, with this base.
        size: Edge of the square images that the base is used to, in pixels.
    """

    name: str
    template: dict[str, Any]
    size: int

    @property
    def is_embedded(self) -> bool:
        """Whether it is the small base that ships with the package."""
        return self.name == NAME

    @property
    def takes_sources(self) -> bool:
        """Whether it is trained on editing pairs."""
        takes: bool = named_family(self.template["model"]["family"]["class_path"]).takes_sources
        return takes


def base_names() -> list[str]:
    """The short names of bases: those of the shipped configs, and ``embedded``."""
    return [NAME, *(name for name in _names() if name != _OF_EMBEDDED)]


def find_base(base: str | None) -> Base:
    """The base of this name, folder, hub id or file.

    Args:
        base: One of :func:`base_names`; or a folder or hub id of a pipeline, or a model in one file, whose family is found.

    Raises:
        UserError: If there is none, or its family is not known.
    """
    names = ", ".join(base_names())
    if not base:
        raise UserError(f"give --base: {names}; or a folder, hub id or .safetensors file of such a model")
    if base in base_names():
        template = _template(_OF_EMBEDDED if base == NAME else base)
        template["trainer"].pop("accelerator", None)  # the demo's, which any machine repeats
        return Base(base, template, template["data"]["init_args"]["resolution"])
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    if not is_hub_id and not Path(base).expanduser().exists():
        raise UserError(f"base={base!r} is no folder, no file, and none of the known names: {names}")
    if not is_hub_id and not os.access(Path(base).expanduser(), os.R_OK):
        raise UserError(f"base={base!r} may not be read; change its permissions")
    return _found(base, names)


def _found(base: str, names: str) -> Base:
    """The base in a folder, on the hub, or in a file."""
    source = ModelSource(base)
    kind = family_of_source(source)
    if kind is None:
        found = source.index().get("_class_name") or "a folder without model_index.json"
        raise UserError(f"base={base!r} is of no known family ({found}); take a model like one of {names}")
    template = _template_of(kind.__name__, base)
    options = template["model"]["family"]["init_args"]
    options["pretrained_model_name_or_path"] = base
    family: Any = named_family(template["model"]["family"]["class_path"])(**options)
    check_single_file(family)
    family.read_configs()
    usual = template["data"]["init_args"]["resolution"]
    return Base(re.sub(r"[^\w.-]", "-", Path(base).stem), template, min(usual, family.default_size))


def _template_of(family: str, base: str) -> dict[str, Any]:
    """The shipped config of a family; of several, the one whose name shares the most words with the base's."""
    words = set(re.split(r"[^a-z0-9]+", base.lower()))
    fitting = {
        name: config
        for name, config in ((name, _template(name)) for name in _names())
        if name != _OF_EMBEDDED and config["model"]["family"]["class_path"].rpartition(".")[2] == family
    }
    if not fitting:
        raise UserError(f"base={base!r} is a {family}, for which no config ships; write one for lit-lora fit")
    return fitting[max(sorted(fitting), key=lambda name: len(words & set(name.split("_"))))]


@cache
def _names() -> tuple[str, ...]:
    """Names of the shipped configs."""
    found = (Path(entry.name) for entry in files("lit_lora.configs").iterdir())
    return tuple(sorted(path.stem for path in found if path.suffix == ".yaml"))


def _template(name: str) -> dict[str, Any]:
    """A shipped config; each call returns a new one."""
    text = (files("lit_lora.configs") / f"{name}.yaml").read_text(encoding="utf-8")
    # libyaml's parser, where PyYAML was built with it, takes a tenth of the time, and all configs are read for some bases.
    config: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return config
