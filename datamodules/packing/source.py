"""The folder or file to pack."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lit_lora.datamodules.packing.caption_template import CaptionTemplate
from lit_lora.datamodules.packing.image_formats import extension_of, image_extension
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.datamodules.packing.unknown_files import UnknownFiles
from lit_lora.datamodules.packing.walk import OtherSplits, walk_files
from lit_lora.errors import UserError
from lit_lora.files import check_regular
from lit_lora.visible import visible

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_REPEATS = re.compile(r"\d+_.")


@dataclass(frozen=True)
class PackSource:
    """A folder or file to pack, and the names of its files.

    Attributes:
        path: Path of the folder or file.
        files: Files that a kind of input needs, by extension in lower case.
        has_images: Whether the folder contains image files.
        out: Output folder, which is not part of the input.
        others: Files of other splits than the training data beside them, which are not part of the input.
        unknown: Files of which no kind of input makes use, by their extension.
        repeats: Folders of images whose names begin with a number, as in ``10_name``.
        image_column: Column of images in tables; None for a column with a usual name.
        caption_column: Column of captions in tables; None for a column with a usual name.
        source_column: Column of source images in tables; None for a column with a usual name, if there is one.
        caption_key: Key of captions in ``.json`` files.
        jobs: Number of processes that scan tar shards.
        template: Makes the captions of images from their names; None to read captions.
        fallback: Caption of images without a caption file; None if these are bad.
        caption_extension: Ending of the files with captions; None for all that are known.
        is_set: Whether the folder is one of several sets, with repeats of its own.
    """

    path: Path
    files: Mapping[str, Sequence[Path]]
    has_images: bool
    out: Path
    others: OtherSplits = field(default_factory=OtherSplits)
    unknown: Mapping[str, BadFile] = field(default_factory=dict)
    repeats: Collection[str] = ()
    image_column: str | None = None
    caption_column: str | None = None
    source_column: str | None = None
    caption_key: str = "caption"
    jobs: int = 1
    template: CaptionTemplate | None = None
    fallback: str | None = None
    caption_extension: str | None = None
    is_set: bool = False

    @classmethod
    def look(cls, path: Path, out: Path, extensions: Collection[str], **options: Any) -> PackSource:
        """Collect the files of a folder in one walk, or take a single file.

        Args:
            path: Path of the folder or file.
            out: Output folder, which is not part of the input.
            extensions: Extensions of the files to collect.
            **options: Attributes from ``image_column`` on.

        Raises:
            UserError: If the folder or file does not exist, or a folder cannot be read.
        """
        if not path.exists():
            raise UserError(f"{visible(path)} does not exist; name the folder or file with the images")
        if not path.is_dir():
            check_regular(path)
            return cls(path, {path.suffix[1:].lower(): [path]}, False, out, **options)
        files: dict[str, list[Path]] = {}
        others, unknown, repeats = OtherSplits(), UnknownFiles(), set()
        has_images = False
        for file, _ in walk_files(path, out, others):
            extension = extension_of(file)
            if extension in extensions:
                files.setdefault(extension, []).append(path / file)
            elif image_extension(file):
                has_images = True
                folder = file.rpartition("/")[0]
                if _REPEATS.match(folder.rpartition("/")[2] or path.name):
                    repeats.add(folder or path.name)
            else:
                unknown.add(file)
        return cls(path, files, has_images, out, others, unknown.entries(), sorted(repeats), **options)

    @property
    def is_file(self) -> bool:
        """Whether the source is a single file."""
        return self.path.is_file()

    @property
    def folder(self) -> Path:
        """Folder to which names of files and samples are relative."""
        return self.path.parent if self.is_file else self.path

    @property
    def metadata(self) -> list[Path]:
        """Metadata files, which list images and have the names that ``datasets`` prescribes, sorted by path."""
        named = (path for paths in self.files.values() for path in paths if path.name in _METADATA)
        return sorted(named, key=Path.as_posix)

    @property
    def column_options(self) -> dict[str, Any]:
        """Arguments of the inputs that have columns."""
        return {
            "image_column": self.image_column,
            "caption_column": self.caption_column,
            "source_column": self.source_column,
            "caption_key": self.caption_key,
            "metadata": bool(self.metadata),
        }

    def check_metadata(self) -> None:
        """Refuse several metadata files in a folder, of which each may list the same images, and kinds that are read differently.

        Raises:
            UserError: If there are such files.
        """
        paths = self.metadata
        for first, second in pairwise(paths):
            if first.parent == second.parent:
                raise UserError(
                    f"{visible(first)} and {visible(second.name)} beside it may list the same images; keep one of them"
                )
        if len({path.suffix == ".parquet" for path in paths}) > 1:
            raise UserError(
                f"{visible(self.path)} has {', '.join(sorted({path.name for path in paths}))}, and Parquet files are not packed "
                "together with others; write the same kind everywhere, or pack the folders one by one"
            )

    def metadata_in(self, extensions: Collection[str]) -> list[Path]:
        """The metadata files if all of them have one of these extensions, otherwise none."""
        paths = self.metadata
        return paths if all(path.suffix[1:].lower() in extensions for path in paths) else []
