"""Adapter methods that initialize an adapter without the base's weights."""

from __future__ import annotations

from typing import ClassVar

from lit_lora.adapters.methods.base import AdapterMethod


class BlockByBlockMethod(AdapterMethod):
    """An adapter method whose adapters can be injected into a model before the base's weights are loaded."""

    block_by_block: ClassVar[bool] = True
