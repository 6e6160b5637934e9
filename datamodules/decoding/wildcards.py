"""Alternatives in captions, one of which is drawn."""

from __future__ import annotations

import re

import numpy as np

from lit_lora.datamodules.decoding.decode import BadSampleError

_MOST_NESTED = 100
_MARKS = re.compile(r"([{|}])")


def drawn_alternatives(text: str, generator: np.random.Generator) -> str:
    """A text with one alternative in place of each ``{one|another}``, all equally probable.

    Inner braces are resolved before the outer ones. Braces without ``|``, or without their counterpart, stay as they are.

    Args:
        text: Text with alternatives.
        generator: Generator of the choices.

    Raises:
        BadSampleError: If braces are nested more than 100 deep.
    """
    groups: list[list[str]] = [[""]]  # the alternatives so far of each open brace; the first is the text itself
    for piece in _MARKS.split(text):
        if piece == "{":
            groups.append([""])
            if len(groups) > _MOST_NESTED + 1:
                raise BadSampleError(f"the wildcards of the caption are nested more than {_MOST_NESTED} deep")
        elif piece == "|" and len(groups) > 1:
            groups[-1].append("")
        elif piece == "}" and len(groups) > 1:
            alternatives = groups.pop()
            groups[-1][-1] += _one_of(alternatives, generator)
        else:
            groups[-1][-1] += piece
    whole, *open_groups = groups
    return whole[0] + "".join("{" + "|".join(alternatives) for alternatives in open_groups)


def _one_of(alternatives: list[str], generator: np.random.Generator) -> str:
    if len(alternatives) == 1:
        return "{" + alternatives[0] + "}"
    return alternatives[int(generator.integers(len(alternatives)))]
