"""The folder or file that is to be packed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_lora.datamodules.packing.image_folder import image_extension
from lit_lora.datamodules.packing.walk import walk_files
from lit_lora.errors import UserError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_METADATA_IMAGE = "file_name"  # as datasets prescribes


@dataclass(frozen=True)
class PackSource:
    """A folder or file to pack, and the names of its files.

    Attributes:
        path: The folder or file.
        files: The files of it that a kind of input asks for, by extension in lower case.
        has_images: Whether there are image files in the folder.
        out: A folder that is no part of the input.
        image_column: Column of images, where there are columns; None for one with a usual name.
        caption_column: Column of captions; None for one with a usual name.
        caption_key: Key of captions in ``.json`` files.
        jobs: Processes that scan tar shards.
    """

    path: Path
    files: Mapping[str, Sequence[Path]]
    has_images: bool
    out: Path
    image_column: str | None = None
    caption_column: str | None = None
    caption_key: str = "caption"
    jobs: int = 1

    @classmethod
    def look(cls, path: Path, out: Path, extensions: Collection[str], **options: Any) -> PackSource:
        """Walk through a folder once, or take a file as it is.

        Args:
            path: The folder or file.
            out: A folder that is no part of the input.
            extensions: Those of the files to collect.
            **options: The attributes from ``image_column`` on.

        Raises:
            UserError: If there is no such folder or file, or a folder cannot be read.
        """
        if not path.exists():
            raise UserError(f"{path} is not a folder or file; name what holds the images")
        if not path.is_dir():
            return cls(path, {path.suffix[1:].lower(): [path]}, False, out, **options)
        files: dict[str, list[Path]] = {}
        has_images = False
        for file, _ in walk_files(path, skip=out):
            extension = Path(file).suffix[1:].lower()
            if extension in extensions:
                files.setdefault(extension, []).append(path / file)
            has_images = has_images or bool(image_extension(file))
        return cls(path, files, has_images, out, **options)

    @property
    def is_file(self) -> bool:
        """Whether it is one file, and not a folder."""
        return self.path.is_file()

    @property
    def folder(self) -> Path:
        """Where names of files and samples start."""
        return self.path.parent if self.is_file else self.path

    @property
    def metadata(self) -> list[Path]:
        """Files that list images, under the names that ``datasets`` prescribes, in the order of their paths."""
        named = (path for paths in self.files.values() for path in paths if path.name in _METADATA)
        return sorted(named, key=Path.as_posix)

    @property
    def column_options(self) -> dict[str, Any]:
        """The arguments of inputs that have columns."""
        image_column = self.image_column or (_METADATA_IMAGE if self.metadata else None)
        options = {"caption_column": self.caption_column, "caption_key": self.caption_key}
        return {"image_column": image_column, **options}

    def metadata_in(self, extensions: Collection[str]) -> list[Path]:
        """The same files where all of them have one of these extensions; none otherwise."""
        paths = self.metadata
        return paths if all(path.suffix[1:].lower() in extensions for path in paths) else []
