"""Methods that start without the base's weights."""

from __future__ import annotations

from typing import ClassVar

from lit_lora.adapters.methods.base import AdapterMethod


class BlockByBlockMethod(AdapterMethod):
    """An adapter method whose adapters can be put into a model before the weights of the base are there."""

    block_by_block: ClassVar[bool] = True
