"""What is remarkable about samples that are packed: training takes them, and their owner may not mean it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.decode import has_transparency
from lit_lora.datamodules.indexing.extensions import IMAGE_EXTENSIONS
from lit_lora.datamodules.packing.color_profile import has_other_colors
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.visible import visible

_EMPTY = "with an empty caption, first {}: trained on without words"
_TRANSPARENT = (
    "with transparent parts, first {}: decoder.background is put behind them, which lit-lora train sets to white; without it "
    "their hidden colors are trained on, unless decoder.mask is alpha"
)
_OTHER_COLORS = (
    "with a color profile other than sRGB, first {}: training takes their numbers for sRGB, so that colors differ from those "
    "that a viewer shows; convert them to sRGB"
)


def remarks(name: str, members: Mapping[str, bytes], caption_key: str, may_be_empty: bool) -> Iterator[BadFile]:
    """Remarks about a sample that can be used.

    Args:
        name: Name of the sample.
        members: Its members by extension, which have been checked.
        caption_key: Key of the caption in ``.json`` members.
        may_be_empty: Whether empty captions are meant.
    """
    if not may_be_empty and not Captions.anywhere(caption_key).draw(members, seed=0, slot=0):
        yield BadFile(name, _EMPTY)
    image = next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members)
    if has_transparency(image):
        yield BadFile(name, _TRANSPARENT)
    if has_other_colors(image):
        yield BadFile(name, _OTHER_COLORS)


def notes_of(found: Sequence[BadFile]) -> list[str]:
    """A note for each kind of remark, with the number of samples and the first of them."""
    by_reason: dict[str, list[str]] = {}
    for one in found:
        by_reason.setdefault(one.reason, []).append(one.file)
    return [
        f"{len(names):,} {'image' if len(names) == 1 else 'images'} {reason.format(visible(names[0]))}"
        for reason, names in by_reason.items()
    ]
