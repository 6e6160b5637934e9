"""Classes of text encoders without the parts that no family needs."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def without_parts(kind: type[Any], *parts: str) -> type[Any]:
    """A subclass of a class of transformers whose models lack some parts; their weights are not read.

    Such a part becomes ``nn.Identity``. So a language model without its head gives its hidden states as logits, which
    pipelines do not read.

    Args:
        kind: Class of the text encoder.
        parts: Paths of the parts, such as ``lm_head`` and ``model.visual``.
    """

    class Reduced(kind):
        _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012  as transformers declares it
            *(kind._keys_to_ignore_on_load_unexpected or ()),
            *(rf"^{re.escape(part)}\." for part in parts),
        ]
        _tied_weights_keys = {  # noqa: RUF012
            name: to for name, to in (kind._tied_weights_keys or {}).items() if not name.startswith(parts)
        }

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for part in parts:
                self.set_submodule(part, nn.Identity())

    # transformers and diffusers know models by the names of their classes.
    Reduced.__name__, Reduced.__qualname__, Reduced.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Reduced
