"""Files beside the data of which packing makes no use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from lit_lora.datamodules.indexing.tar_headers import is_compressed_tar
from lit_lora.datamodules.packing.left_out import BadFile

_OWN = frozenset(
    {
        "plan.json",
        "manifest.json",
        "sizes.json",
        "shardindex.json",
        "bad.jsonl",
        "pack.lock",
        "cache.json",
        "state.json",
    }
    | {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "readme", "license", "copying", "citation.cff"}
)
"""Descriptions of data sets, in lower case, whose loss nobody has to be told."""

_NO_DATA = frozenset({"md", "index", "py", "sh", "yaml", "yml", "toml", "log", "pdf", "html", "lock", "part"})
_ARCHIVES = frozenset({"zip", "rar", "7z", "gz", "tgz", "bz2", "xz", "zst"})


class UnknownFiles:
    """The files of a folder that are no images, captions, tables or shards, counted by extension.

    Captions are among them only as long as no image is beside them, which the walk of a folder of images decides.

    Attributes:
        entries: One entry for the files of each extension.
    """

    def __init__(self) -> None:
        self.entries: dict[str, BadFile] = {}

    def add(self, file: str) -> None:
        """Count a file unless it describes the data, or is hidden."""
        path = PurePosixPath(file)
        extension = path.suffix[1:].lower()
        name = path.name.lower()
        is_own = name in _OWN or extension in _NO_DATA or name.endswith("_stats.json") or path.stem.lower() in _OWN
        if is_own or any(part.startswith(".") for part in path.parts):
            return
        if extension in self.entries:
            self.entries[extension] = replace(self.entries[extension], count=self.entries[extension].count + 1)
        else:
            self.entries[extension] = BadFile(file, _reason(path.name, extension))


def _reason(name: str, extension: str) -> str:
    if is_compressed_tar(name):
        return "is a compressed tar; decompress it (gunzip), then pack it"
    if extension in _ARCHIVES:
        return "is an archive; unpack it, then pack the folder"
    if not extension:
        return "has no extension, so its format is unknown"
    return f"files that end in .{extension} are not packed"
