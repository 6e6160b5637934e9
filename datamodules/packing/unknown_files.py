"""Files beside the data of which packing makes no use."""

from __future__ import annotations

from lit_lora.datamodules.indexing.tar_headers import is_compressed_tar
from lit_lora.datamodules.packing.image_formats import extension_of
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
    """

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def add(self, file: str) -> None:
        """Count a file unless it describes the data, or is hidden."""
        name = file.rpartition("/")[2].lower()
        extension = extension_of(name)
        is_own = extension in _NO_DATA or name.partition(".")[0] in _OWN or name in _OWN or name.endswith("_stats.json")
        if is_own or file.startswith(".") or "/." in file:
            return
        self._first.setdefault(extension, file)
        self._counts[extension] = self._counts.get(extension, 0) + 1

    def entries(self) -> dict[str, BadFile]:
        """One entry for the files of each extension."""
        return {
            extension: BadFile(self._first[extension], _reason(self._first[extension], extension), count)
            for extension, count in self._counts.items()
        }


def _reason(name: str, extension: str) -> str:
    if is_compressed_tar(name):
        return "is a compressed tar; decompress it (gunzip), then pack it"
    if extension in _ARCHIVES:
        return "is an archive; unpack it, then pack the folder"
    if not extension:
        return "has no extension, so its format is unknown"
    return f"files that end in .{extension} are not packed"
