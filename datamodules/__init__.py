"""Training data from tar shards: indexing, planning, decoding, loading, packing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_lora.lazy import lazy_names

if TYPE_CHECKING:
    from lit_lora.datamodules.batches.buckets import AspectRatioBuckets
    from lit_lora.datamodules.batches.chunks import Chunks
    from lit_lora.datamodules.batches.plan import Plan
    from lit_lora.datamodules.decoding.captions import Captions, CaptionSource
    from lit_lora.datamodules.decoding.decode import BadSampleError
    from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
    from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
    from lit_lora.datamodules.indexing.index import ShardIndex
    from lit_lora.datamodules.loading.data_progress import DataProgress
    from lit_lora.datamodules.staging.staging import Staging
    from lit_lora.datamodules.webdataset_datamodule import WebDatasetDataModule
    from lit_lora.datamodules.webdataset_stream_datamodule import WebDatasetStreamDataModule

__all__ = [
    "AspectRatioBuckets",
    "BadSampleError",
    "CaptionSource",
    "Captions",
    "Chunks",
    "DataProgress",
    "ImageDecoder",
    "Plan",
    "SampleDecoder",
    "ShardIndex",
    "Staging",
    "WebDatasetDataModule",
    "WebDatasetStreamDataModule",
]

_MODULES = {
    "AspectRatioBuckets": "lit_lora.datamodules.batches.buckets",
    "BadSampleError": "lit_lora.datamodules.decoding.decode",
    "CaptionSource": "lit_lora.datamodules.decoding.captions",
    "Captions": "lit_lora.datamodules.decoding.captions",
    "Chunks": "lit_lora.datamodules.batches.chunks",
    "DataProgress": "lit_lora.datamodules.loading.data_progress",
    "ImageDecoder": "lit_lora.datamodules.decoding.image_decoder",
    "Plan": "lit_lora.datamodules.batches.plan",
    "SampleDecoder": "lit_lora.datamodules.decoding.sample_decoder",
    "ShardIndex": "lit_lora.datamodules.indexing.index",
    "Staging": "lit_lora.datamodules.staging.staging",
    "WebDatasetDataModule": "lit_lora.datamodules.webdataset_datamodule",
    "WebDatasetStreamDataModule": "lit_lora.datamodules.webdataset_stream_datamodule",
}

__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
