"""Members of a shard that are passed over, and the reasons."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from lit_lora.datamodules.indexing.extensions import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from lit_lora.datamodules.indexing.hidden_files import is_hidden
from lit_lora.visible import visible

_PACK = "`lit-lora shards pack` packs them anew"


class Unread(NamedTuple):
    """A member that is passed over.

    Attributes:
        name: Name of the member, for messages.
        reason: Description of the reason, and what to do.
    """

    name: str
    reason: str


class UnreadMembers:
    """The members of one shard that its index passes over; read the attributes when all have been added.

    Attributes:
        lost: Members that look like parts of samples: links, and images and captions whose key contains a dot.
        others: Names of the other members, by the part after the first dot.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._links: dict[str, str] = {}
        self._dotted: dict[str, set[str]] = {}

    def add(self, info: tarfile.TarInfo) -> None:
        """Add a member, unless it is a folder or a hidden file of an operating system."""
        if info.isdir() or is_hidden(info.name):
            return
        self._names.append(info.name)
        key, extension = split_dotted(info.name)
        if extension not in (*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS):
            return
        if info.islnk() or info.issym():
            self._links[info.name] = info.linkname
        elif info.isreg() and not info.issparse():
            self._dotted.setdefault(key, set()).add(extension)

    @cached_property
    def lost(self) -> Sequence[Unread]:
        return [Unread(name, reason) for name in self._names if (reason := self._why_lost(name))]

    @cached_property
    def others(self) -> Mapping[str, Sequence[str]]:
        lost = {member.name for member in self.lost}
        return by_ending(name for name in self._names if name not in lost)

    def describe_lost(self) -> str:
        """The number of lost members, with the first of them."""
        first = self.lost[0]
        return f"{len(self.lost)} members are passed over, first {visible(first.name)}, since {first.reason}"

    def _why_lost(self, name: str) -> str:
        if name in self._links:
            return f"it is a link to {visible(self._links[name])}, which an index does not follow; {_PACK}"
        if is_sample(self._dotted.get(split_dotted(name)[0], ())):
            return f"a key ends at the first dot of a name; {_PACK}, with keys without dots"
        return ""


def by_ending(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of members, by the part after the first dot."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition("/")[2].partition(".")[2], []).append(name)
    return found


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by webdataset's rule: the key ends at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem else ("", "")


def split_dotted(name: str) -> tuple[str, str]:
    """Key and extension of a name whose key contains dots: the key ends at the last dot."""
    stem, dot, extension = name.rpartition(".")
    return (stem, extension.lower()) if dot and "/" not in extension and stem.rpartition("/")[2] else ("", "")


def is_sample(extensions: Collection[str]) -> bool:
    """Whether members with these extensions make a sample: an image and a caption."""
    return any(e in extensions for e in IMAGE_EXTENSIONS) and any(e in extensions for e in CAPTION_EXTENSIONS)
