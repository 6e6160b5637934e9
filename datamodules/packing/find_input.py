"""The kinds of input to packing, and the choice of one for a folder or file."""

from __future__ import annotations

from pathlib import Path

from lit_lora.datamodules.indexing.extensions import IMAGE_EXTENSIONS
from lit_lora.datamodules.packing.caption_template import CaptionTemplate
from lit_lora.datamodules.packing.column_table import ColumnTable
from lit_lora.datamodules.packing.image_folder import ImageFolder
from lit_lora.datamodules.packing.image_table import ImageTable
from lit_lora.datamodules.packing.input import PackInput
from lit_lora.datamodules.packing.left_out import list_first
from lit_lora.datamodules.packing.listed_images import ListedImages
from lit_lora.datamodules.packing.paired_images import PairedImages, check_sources
from lit_lora.datamodules.packing.row_file import ROW_EXTENSIONS
from lit_lora.datamodules.packing.saved_dataset import SavedDataset
from lit_lora.datamodules.packing.source import PackSource
from lit_lora.datamodules.packing.tar_files import TarFiles
from lit_lora.datamodules.packing.unused import name_unused
from lit_lora.errors import UserError
from lit_lora.visible import visible

INPUTS: tuple[type[PackInput], ...] = (SavedDataset, ImageTable, ListedImages, ImageFolder, TarFiles, ColumnTable)
"""All kinds of input, in the order in which they are tried: img2dataset writes a Parquet file beside each tar, for example."""


def find_input(
    source: Path,
    out: Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    caption_key: str = "caption",
    jobs: int = 1,
    template: CaptionTemplate | None = None,
    fallback: str | None = None,
    caption_extension: str | None = None,
    is_set: bool = False,
    sources: Path | None = None,
    source_column: str | None = None,
) -> PackInput:
    """The samples of a folder or file, found by the first kind of input that finds any.

    Args:
        source: Folder, or a ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow`` or ``.tar`` file.
        out: Output folder, which is not part of the input.
        image_column: Column of images in tables. Defaults to None: a column with a usual name.
        caption_column: Column of captions in tables. Defaults to None: a column with a usual name.
        caption_key: Key of captions in ``.json`` files. Defaults to "caption".
        jobs: Number of processes that scan tar shards. Defaults to 1.
        template: Makes the captions of a folder's images from their names. Defaults to None: captions are read.
        fallback: Caption of a folder's images without a caption file. Defaults to None: these images are bad.
        caption_extension: Ending of the caption files beside images. Defaults to None: all of ``CAPTIONS``.
        is_set: Whether the folder is one of several sets, with repeats of its own. Defaults to False.
        sources: Folder of source images, each at the same place as its target. Defaults to None: they are beside their targets,
            or in a table.
        source_column: Column of source images in tables. Defaults to None: a column with a usual name.

    Raises:
        UserError: If nothing can be packed, a table cannot be parsed, or the sources cannot be paired.
    """
    if sources is not None:
        check_sources(sources, source, out)
    looked = PackSource.look(
        source,
        out,
        {extension for kind in INPUTS for extension in kind.extensions},
        image_column=image_column,
        caption_column=caption_column,
        caption_key=caption_key,
        jobs=jobs,
        template=template,
        fallback=fallback,
        caption_extension=caption_extension,
        is_set=is_set,
        source_column=source_column,
    )
    if template is None:
        looked.check_metadata()
    for kind in INPUTS if template is None else (ImageFolder,):
        found = kind.find(looked)
        if found is not None:
            found = name_unused(looked, found)
            return found if sources is None else _paired(found, source, sources)
    raise _nothing_to_pack(looked, source)


def _nothing_to_pack(looked: PackSource, source: Path) -> UserError:
    """The error for a folder or file in which no kind of input finds anything."""
    if looked.metadata or looked.is_file:
        paths = looked.metadata or [source]
        extensions = sorted({path.suffix.lower() for path in paths} - {""})
        ending = f" ({', '.join(extensions)})" if extensions else ", whose name has no ending"
        return UserError(
            f"cannot pack {visible(paths[0])}{ending}; name a folder, a"
            f" table ({', '.join(ROW_EXTENSIONS)}, parquet) or a .tar"
        )
    unknown = sorted(looked.unknown.values(), key=lambda file: -file.count)
    also = f"; it holds {list_first(unknown)}" if unknown else ""
    return UserError(
        f"{visible(source)} holds no images ({', '.join(IMAGE_EXTENSIONS)} and others), no shards and no tables; name another"
        f" folder{also}"
    )


def _paired(targets: PackInput, source: Path, sources: Path) -> PackInput:
    """Images with the sources of another folder."""
    if not targets.captions_are_beside and not targets.packs_images_beside:
        raise UserError(
            f"sources={visible(sources)} belong to files of images, and {visible(source)} holds images inside tables or shards; "
            "pack them with a column or a member for the source (source_column, KEY.source.png)"
        )
    return PairedImages.of(targets, sources)
