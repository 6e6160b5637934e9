"""Source images of editing pairs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lit_lora.datamodules.decoding.decode import BadSampleError, check_pixels, decode_rgb
from lit_lora.datamodules.indexing.extensions import SOURCE_EXTENSIONS
from lit_lora.datamodules.indexing.scan import image_size

_MOST_STRETCHING = 0.02  # of a source that was rounded to other pixels than its target


def decode_source(members: Mapping[str, bytes], size: tuple[int, int], background: str | None = None) -> Tensor:
    """The source image of a sample, uint8 (3, H, W), of any size with the target's aspect ratio.

    Args:
        members: The sample's members by extension.
        size: Width and height of the target, the sample's own image, in pixels.
        background: Color behind transparent parts; see :func:`~lit_lora.datamodules.decoding.decode.decode_rgb`.

    Raises:
        BadSampleError: If there is no source or more than one, it cannot be decoded, or its aspect ratio differs from the
            target's by more than 2 %, so that both could not be cropped alike.
    """
    found = [extension for extension in SOURCE_EXTENSIONS if extension in members]
    if len(found) != 1:
        number = "no source image" if not found else f"more than one source image ({', '.join(found)})"
        raise BadSampleError(f"there is {number}; an editing pair has one of {', '.join(SOURCE_EXTENSIONS)}")
    data = members[found[0]]
    width, height = image_size(data)
    try:
        check_pixels(width, height)
        image = decode_rgb(data, background)
    except BadSampleError as error:
        raise BadSampleError(f"source image: {error}") from error
    if abs(width * size[1] / (height * size[0]) - 1) > _MOST_STRETCHING:
        raise BadSampleError(
            f"the source has {width} x {height} pixels, and the image {size[0]} x {size[1]}: crop them to one aspect ratio"
        )
    return image
