"""Training data from tar shards: indexing, planning, decoding, loading, packing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_lora.lazy import lazy_names

if TYPE_CHECKING:
    from lit_lora.datamodules.batches.buckets import AspectRatioBuckets
    from lit_lora.datamodules.batches.plan import Plan
    from lit_lora.datamodules.decoding.captions import Captions, CaptionSource
    from lit_lora.datamodules.indexing.index import ShardIndex
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
    "AspectRatioBuckets": "lit_lora.datamodules.batches.buckets",
    "CaptionSource": "lit_lora.datamodules.decoding.captions",
    "Captions": "lit_lora.datamodules.decoding.captions",
    "Plan": "lit_lora.datamodules.batches.plan",
    "ShardIndex": "lit_lora.datamodules.indexing.index",
    "WebDatasetDataModule": "lit_lora.datamodules.webdataset_datamodule",
    "WebDatasetStreamDataModule": "lit_lora.datamodules.webdataset_stream_datamodule",
}

__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
