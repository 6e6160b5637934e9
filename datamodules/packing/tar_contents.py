"""The samples of one shard that is packed anew, including those that an index passes over."""

from __future__ import annotations

import posixpath
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from lit_lora.datamodules.indexing.extensions import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from lit_lora.datamodules.indexing.hidden_files import is_hidden
from lit_lora.datamodules.indexing.tar_headers import walk_headers
from lit_lora.datamodules.indexing.unread_members import by_ending, split_dotted, split_name
from lit_lora.datamodules.packing.image_formats import IMAGE_FILES
from lit_lora.datamodules.packing.images_beside import IMAGES_BESIDE
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.visible import visible

MEMBERS = (*IMAGE_FILES[:-1], *CAPTION_EXTENSIONS, *IMAGES_BESIDE)
"""Extensions of the members that are packed; a sample's image is the first of them that it has."""

TWICE = -1
"""Replaces the offset of a member that a sample has twice."""

_MAX_LINKS = 40  # of a link to a link, as in Linux
_IMAGES = frozenset(IMAGE_FILES)
_CAPTIONS = frozenset(CAPTION_EXTENSIONS)

Place = tuple[int, int]
"""Offset and size of a member's data, in bytes."""


@dataclass
class TarContents:
    """The samples of a shard, and what is left out.

    Keys end at the first dot of a name. If this leaves an unknown extension, as in ``22.05.jpg``, the key ends at the last dot,
    provided that an image and a caption share it. Links to members are read as the members to which they lead.

    Attributes:
        samples: Place of each member by its extension, by the sample's key, in the order of the archive.
        bad: Members that look like parts of samples but cannot be used.
        skipped: Members that are no part of a sample, counted by the end of their names.
    """

    samples: dict[str, dict[str, Place]] = field(default_factory=dict)
    bad: list[BadFile] = field(default_factory=list)
    skipped: list[BadFile] = field(default_factory=list)

    @classmethod
    def read(cls, shard: Path) -> TarContents:
        """Read the headers of a shard.

        Raises:
            UserError: If the shard is compressed, truncated or damaged.
            OSError: If it cannot be read.
        """
        with shard.open("rb") as file:
            infos = [info for info in walk_headers(shard, file) if not info.isdir() and not is_hidden(info.name)]
        return _Grouping(infos).contents()


class _Grouping:
    """Assigns the members of a shard to samples."""

    def __init__(self, infos: list[tarfile.TarInfo]) -> None:
        self.bad: list[BadFile] = []
        self.unknown: list[str] = []  # names of members that are no part of a sample
        self.places: list[tuple[str, Place]] = []
        regular = {_normal(info.name): info for info in infos if info.isreg() and not info.issparse()}
        links = {_normal(info.name): _target(info) for info in infos if info.islnk() or info.issym()}
        for info in infos:
            found = info if info.isreg() and not info.issparse() else _follow(_normal(info.name), links, regular)
            if found is not None:
                self.places.append((info.name, (found.offset_data, found.size)))
            elif split_dotted(info.name)[1] in MEMBERS:
                what = f"is a link to {visible(info.linkname)}" if info.linkname else "is no regular file"
                self.bad.append(BadFile(info.name, f"{what}, which the shard does not hold; pack it with its target"))
            else:
                self.unknown.append(info.name)

    def contents(self) -> TarContents:
        dotted: dict[str, set[str]] = {}
        for name, _ in self.places:
            if split_name(name)[1] not in MEMBERS:
                dotted.setdefault(split_dotted(name)[0], set()).add(split_dotted(name)[1])
        samples: dict[str, dict[str, Place]] = {}
        rest: list[str] = []
        for name, place in self.places:
            key, extension = split_name(name)
            if not key or extension not in MEMBERS:
                key, extension = split_dotted(name)
                if not (extension in MEMBERS and dotted[key] & _IMAGES and dotted[key] & _CAPTIONS):
                    rest.append(name)
                    continue
            members = samples.setdefault(key, {})
            members[extension] = (TWICE, 0) if extension in members else place
        for name in rest:
            self._leave_out(name, samples)
        for key, members in samples.items():
            self._choose_image(key, members)
        return TarContents(samples, self.bad, self._skipped())

    def _leave_out(self, name: str, samples: dict[str, dict[str, Place]]) -> None:
        """Decide whether a member that is no part of a sample is one that the user misses."""
        extension = split_dotted(name)[1]
        if extension in MEMBERS and split_name(name)[0] not in samples:
            lacks = "a caption" if extension in _IMAGES else "an image"
            reason = (
                f"its key contains a dot, and it lacks {lacks} of the same name; rename the members to KEY.EXTENSION"
            )
            self.bad.append(BadFile(name, reason))
        else:
            self.unknown.append(name)

    def _choose_image(self, key: str, members: dict[str, Place]) -> None:
        """Keep one image of those that would have to be converted, and none if another image is there."""
        images = [extension for extension in MEMBERS if extension in members and extension in _IMAGES]
        for extension in images[1:]:
            if extension not in IMAGE_EXTENSIONS:
                del members[extension]
                self.unknown.append(f"{key}.{extension}")

    def _skipped(self) -> list[BadFile]:
        return [BadFile(names[0], _why_skipped(end), len(names)) for end, names in by_ending(self.unknown).items()]


def _why_skipped(end: str) -> str:
    return f"members that end in .{visible(end)} are not packed" if end else "is no image or caption"


def _normal(name: str) -> str:
    return posixpath.normpath(name)


def _target(info: tarfile.TarInfo) -> str:
    folder = (
        posixpath.dirname(info.name) if info.issym() else ""
    )  # hard links name members from the root of the archive
    return _normal(posixpath.join(folder, info.linkname))


def _follow(name: str, links: dict[str, str], regular: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    for _ in range(_MAX_LINKS):
        if name in regular:
            return regular[name]
        if name not in links:
            return None
        name = links[name]
    return None
