"""What there is to pack in a folder or file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_lora.datamodules.indexing.scan import IMAGE_EXTENSIONS
from lit_lora.datamodules.packing.arrow import ArrowFile
from lit_lora.datamodules.packing.column_table import ColumnTable
from lit_lora.datamodules.packing.image_folder import ImageFolder, image_extension
from lit_lora.datamodules.packing.image_table import ImageTable
from lit_lora.datamodules.packing.input import PackInput
from lit_lora.datamodules.packing.parquet import ParquetFile
from lit_lora.datamodules.packing.row_file import ROW_EXTENSIONS
from lit_lora.datamodules.packing.tar_files import TarFiles
from lit_lora.datamodules.packing.walk import walk_files
from lit_lora.errors import UserError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_METADATA_IMAGE = "file_name"  # as datasets prescribes


def find_input(
    source: Path,
    out: Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    caption_key: str = "caption",
    jobs: int = 1,
) -> PackInput:
    """The samples of a folder or file, by what is in it.

    A folder is, in this order: one of ``datasets.save_to_disk``; images that ``metadata.jsonl``, ``.csv`` or ``.parquet``
    files list; images with caption files beside them; tar shards; parquet files. A file is a table.

    Args:
        source: The folder; or a ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file, or a ``.tar`` shard.
        out: A folder that is no part of the input.
        image_column: The column of images, where there are columns; None looks for a usual name.
        caption_column: The same for captions.
        caption_key: The key of captions in ``.json`` files.
        jobs: Processes that scan tar shards.

    Raises:
        UserError: Nothing there can be packed, or a table cannot be understood.
    """
    if not source.exists():
        raise UserError(f"{source} is not a folder or file; name what holds the images")
    folder, paths = (source, _list_files(source, out)) if source.is_dir() else (source.parent, [source])
    if not paths:
        return ImageFolder.find(source, skip=out)
    is_metadata = all(path.name in _METADATA for path in paths)
    if is_metadata and image_column is None:
        image_column = _METADATA_IMAGE
    columns: dict[str, Any] = {
        "image_column": image_column,
        "caption_column": caption_column,
        "caption_key": caption_key,
    }
    extensions = {path.suffix[1:].lower() for path in paths}
    if extensions <= set(ROW_EXTENSIONS):
        return ImageTable.read(folder, paths, inside=is_metadata, **columns)
    if extensions == {"parquet"}:
        return ColumnTable.of(folder, [ParquetFile(path) for path in paths], **columns)
    if extensions == {"arrow"}:
        return ColumnTable.of(folder, [ArrowFile(path) for path in paths], **columns)
    if extensions == {"tar"}:
        return TarFiles.scan(folder, paths, jobs)
    raise UserError(
        f"cannot pack {paths[0]} ({', '.join(f'.{extension}' for extension in sorted(extensions))}); name a folder, a"
        f" table ({', '.join(ROW_EXTENSIONS)}, parquet) or a .tar"
    )


def _list_files(folder: Path, out: Path) -> list[Path]:
    """The tables or shards that a folder consists of; none where it consists of images."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(str(path.parent) for path in sorted(folder.glob("*/state.json")))
        raise UserError(f"{folder} holds several splits; pack one of them: {splits}")
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    found: dict[str, list[Path]] = {"metadata": [], "tar": [], "parquet": []}
    has_images = False
    for file, _ in walk_files(folder, skip=out):
        path = folder / file
        kind = "metadata" if path.name in _METADATA else path.suffix[1:]
        if kind in found:
            found[kind].append(path)
        has_images = has_images or bool(image_extension(file))
    paths = found["metadata"] or ([] if has_images else found["tar"] or found["parquet"])
    if not paths and not has_images:
        raise UserError(
            f"{folder} holds no images ({', '.join(IMAGE_EXTENSIONS)}), no shards and no tables; name another folder"
        )
    return paths


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set that ``datasets`` saved."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        paths = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'state.json'} does not list the files of a saved data set; save it again"
        ) from error
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]}, which {folder / 'state.json'} lists, is missing; save the data set again")
    return paths
