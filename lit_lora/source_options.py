"""Options of a class, read from its source: importing the libraries that it needs takes seconds."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

_SCALARS = ("bool", "float", "int")


class Option(NamedTuple):
    """An option, whose type is read only for a value that may not be possible: that can take the sources of several modules.

    Args:
        annotation: Its type; None if it has none.
        source: File that has the annotation.
    """

    annotation: ast.expr | None
    source: Path

    def refuse(self, value: Any) -> str | None:
        """Why the option cannot have a value; None if it may.

        Only words are refused, and fractions where whole numbers are needed; the parser converts some of the other values.

        Args:
            value: Value as YAML reads it.
        """
        is_word = isinstance(value, str) and not _is_number(value)
        is_fraction = isinstance(value, float) and not value.is_integer()
        if not (is_word or is_fraction) or (found := _values(self.annotation, self.source)) is None:
            return None
        types, choices = found
        possible = value in choices if is_word else bool(choices) or types != ["int"]
        return None if possible else not_possible(str(value), types, choices)


def not_possible(value: str, types: Sequence[str], choices: Sequence[str]) -> str:
    """Say in a sentence that a value has none of the types and is none of the choices; one of both may be empty."""
    listed = ", ".join(dict.fromkeys(choices))
    named = f"{'an' if types[0][0] in 'aeiouAEIOU' else 'a'} {' or '.join(types)}" if types else ""
    if named and listed:
        return f"{value!r} is neither {named} nor one of {listed}"
    return f"{value!r} is none of {listed}" if listed else f"{value!r} is not {named}"


def options_of(source: Path, class_name: str, method: str = "__init__") -> dict[str, Option]:
    """Options that a method of a class takes.

    Args:
        source: File of the class.
        class_name: Name of the class.
        method: Name of the method.

    Returns:
        The options by name; empty if the source is not there, or the method takes any option.
    """
    classes = [one for one in _statements(source) if isinstance(one, ast.ClassDef) and one.name == class_name]
    for statement in (statement for found in classes for statement in found.body):
        if isinstance(statement, ast.FunctionDef) and statement.name == method:
            own = statement.args
            found = () if own.kwarg else (*own.posonlyargs, *own.args, *own.kwonlyargs)
            return {each.arg: Option(each.annotation, source) for each in found}
    return {}


def _values(annotation: ast.expr | None, source: Path) -> tuple[list[str], list[str]] | None:
    """Types and choices of an annotation such as ``int | Literal["a"] | None``; None if it has any other part."""
    types: set[str] = set()
    choices: list[str] = []
    for part in _parts(annotation, source):
        if isinstance(part, ast.Name) and part.id in _SCALARS:
            types.add(part.id)
        elif isinstance(part, ast.Subscript) and _name(part.value) == "Literal":
            choices += [str(one.value) for one in _elements(part.slice) if isinstance(one, ast.Constant)]
        elif not isinstance(part, ast.Constant) or part.value is not None:
            return None
    return (sorted(types), choices) if types or choices else None


def _parts(annotation: ast.expr | None, source: Path) -> Iterator[ast.expr | None]:
    """Members of a union; names of types that a module defines stand for their definition."""
    if isinstance(annotation, ast.BinOp):
        for side in (annotation.left, annotation.right):
            yield from _parts(side, source)
    elif isinstance(annotation, ast.Subscript) and _name(annotation.value) in ("Optional", "Union"):
        for member in _elements(annotation.slice):
            yield from _parts(member, source)
    elif isinstance(annotation, ast.Name) and (found := _definition(annotation.id, source)):
        yield from _parts(*found)
    else:
        yield annotation


def _definition(name: str, source: Path) -> tuple[ast.expr, Path] | None:
    """What a name stands for in a module, with the file that says so; None if it is not assigned there or in one it is from."""
    for statement in _statements(source):
        if isinstance(statement, ast.Assign) and [_name(target) for target in statement.targets] == [name]:
            return statement.value, source
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.level == 0:
            for alias in statement.names:
                if (alias.asname or alias.name) == name and (origin := source_of(statement.module)):
                    return _definition(alias.name, origin)
    return None


def source_of(module: str) -> Path | None:
    """Source file of a module, found without importing it or the packages that it is in; None if there is none."""
    top, *names = module.split(".")
    found = PathFinder.find_spec(top)
    for place in (found.submodule_search_locations if found else None) or ():
        path = Path(place, *names)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _elements(node: ast.expr) -> Sequence[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _is_number(word: str) -> bool:
    """Whether a word is a number for a parser, such as 1e-4, which is a word for YAML."""
    try:
        float(word)
    except ValueError:
        return False
    return True


@cache  # each config asks for several methods
def _statements(source: Path) -> Sequence[ast.stmt]:
    """Statements of a source file; none if it is not there."""
    try:
        return ast.parse(source.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return ()
