"""YAML and JSON in which no mapping has a key twice; their parsers would keep the last value without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lit_lora.visible import visible


def load_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: If a mapping has a key twice.
        yaml.YAMLError: If the text is not YAML.
    """
    import yaml  # config files are checked before anything is imported that takes time

    check_unique_keys(text)
    return yaml.safe_load(text)


def check_unique_keys(text: str) -> None:
    """Refuse a YAML document in which a mapping has a key twice.

    Raises:
        ValueError: If one has; the message names the key and both lines.
        yaml.YAMLError: If the text is not YAML.
    """
    import yaml

    for mapping in _mappings(yaml.compose(text, Loader=yaml.SafeLoader)):
        lines: dict[tuple[str, str], int] = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(_twice(key.value, f" in lines {lines[name]} and {line}"))
            lines[name] = line


def load_json(text: str | bytes) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: If the text is not JSON, or an object has a key twice.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(_twice(next(name for name in names if names.count(name) > 1), ""))
    return found


def _mappings(root: Any) -> Iterator[Any]:
    """All mappings in a YAML document, the outer ones first; an anchor's only once."""
    import yaml

    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _twice(name: str, where: str) -> str:
    return f"{visible(name)} is given twice{where}, and only the last would count; give it once"
