"""Packing of images that ``metadata.parquet`` files list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_lora.datamodules.packing.column_table import ColumnTable
from lit_lora.datamodules.packing.parquet import ParquetFile

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource


@dataclass(frozen=True, eq=False, kw_only=True)
class ListedImages(ColumnTable):
    """Rows of ``metadata.parquet`` files in a folder of images, each with the path of an image and a caption."""

    @classmethod
    def find(cls, source: PackSource) -> ColumnTable | None:
        files = [ParquetFile(path) for path in source.metadata_in(("parquet",))]
        return cls.of(source.folder, files, others=source.others, **source.column_options) if files else None
