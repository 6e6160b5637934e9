"""Training data from tar shards: indexing, planning, decoding, loading, packing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_lora.datamodules.index import ShardIndex
    from lit_lora.datamodules.plan import Plan
    from lit_lora.datamodules.webdataset_datamodule import WebDatasetDataModule

__all__ = ["Plan", "ShardIndex", "WebDatasetDataModule"]

_MODULES = {"Plan": "plan", "ShardIndex": "index", "WebDatasetDataModule": "webdataset_datamodule"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lit_lora.datamodules.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
