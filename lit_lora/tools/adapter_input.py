"""Reads the adapters that the commands of ``lit-lora adapter`` are given."""

from __future__ import annotations

from lit_lora.adapter_tools.low_rank import one_thread
from lit_lora.formats import AdapterFiles
from lit_lora.formats.find import read_adapter
from lit_lora.tools.named_family import named_family


@one_thread()
def read_input(path: str, family: str | None = None) -> AdapterFiles:
    """Read an adapter.

    Args:
        path: File or folder.
        family: Name or import path of its model family; defaults to the family that the file tells.

    Raises:
        UserError: If the path holds no complete adapter, or the family is not known.
    """
    return read_adapter(path, named_family(family) if family else None)
