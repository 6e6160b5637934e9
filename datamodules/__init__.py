"""Training data from tar shards: indexing, planning, decoding, loading, packing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_lora.datamodules.buckets import AspectRatioBuckets
    from lit_lora.datamodules.captions import Captions, CaptionSource
    from lit_lora.datamodules.indexing.index import ShardIndex
    from lit_lora.datamodules.plan import Plan
    from lit_lora.datamodules.webdataset_datamodule import WebDatasetDataModule
    from lit_lora.datamodules.webdataset_stream_datamodule import WebDatasetStreamDataModule

__all__ = [
    "AspectRatioBuckets",
    "CaptionSource",
    "Captions",
    "Plan",
    "ShardIndex",
    "WebDatasetDataModule",
    "WebDatasetStreamDataModule",
]

_MODULES = {
    "AspectRatioBuckets": "buckets",
    "CaptionSource": "captions",
    "Captions": "captions",
    "Plan": "plan",
    "ShardIndex": "indexing.index",
    "WebDatasetDataModule": "webdataset_datamodule",
    "WebDatasetStreamDataModule": "webdataset_stream_datamodule",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lit_lora.datamodules.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
