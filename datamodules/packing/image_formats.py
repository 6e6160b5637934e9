"""Image files that packing accepts, and their conversion to the formats of shards."""

from __future__ import annotations

import io
import warnings
from importlib import import_module

from PIL import Image, ImageOps, UnidentifiedImageError

from lit_lora.datamodules.decoding.decode import BadSampleError, check_pixels
from lit_lora.datamodules.indexing.extensions import IMAGE_EXTENSIONS
from lit_lora.datamodules.indexing.image_format import image_format

_RENAMED = {"jfif": "jpg", "jpe": "jpg", "jif": "jpg", "jfi": "jpg", "pjpeg": "jpg", "pjp": "jpg", "apng": "png"}
"""Other extensions of the formats of shards."""

_CONVERTED = (
    "bmp", "dib", "gif", "tif", "tiff", "avif", "avifs", "heic", "heif", "hif", "jp2", "j2k", "jpf", "jpx", "j2c", "jpc",
    "ppm", "pgm", "pbm", "pnm", "tga", "pcx", "qoi", "sgi",
)  # fmt: skip
_REFUSED = (
    "jxl", "psd", "svg", "exr", "hdr", "ico", "icns", "eps", "xcf", "dds", "dng", "cr2", "cr3", "nef", "arw", "orf", "raf",
    "rw2", "raw",
)  # fmt: skip

PACKED_IMAGES = (*IMAGE_EXTENSIONS, *_RENAMED, *_CONVERTED)
"""Extensions of the image files that are packed."""

ANY_IMAGE = "image"
"""Name of the member of an image whose format only its bytes tell."""

IMAGE_FILES = (*IMAGE_EXTENSIONS, *_RENAMED, *_CONVERTED, *_REFUSED, ANY_IMAGE)
"""Extensions by which image files are found; all are packed, or left out with a reason."""

_ALL = frozenset(IMAGE_FILES)

NOT_AN_IMAGE = (
    f"is not one of the image formats {', '.join((*IMAGE_EXTENSIONS, *_CONVERTED))}; convert it to PNG or JPEG"
)
"""Reason for which a file is left out."""

_FORMATS = ("BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "PCX", "QOI", "SGI")
"""Formats that Pillow may open; its other readers start programs or read files that are no single images."""

_HEIF = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"))

_KEPT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_SAFE_MODES = {"CMYK": "RGB", "YCbCr": "RGB", "RGBX": "RGB", "PA": "RGBA", "RGBa": "RGBA", "La": "LA", "I;16B": "I;16"}


def image_extension(file: str) -> str:
    """Extension of an image file in lower case; empty for other files."""
    extension = extension_of(file)
    return extension if extension in _ALL else ""


def extension_of(file: str) -> str:
    """Extension of a file in lower case, as of ``Path.suffix``, which takes ten times as long."""
    name = file.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot + 1 :].lower() if dot > 0 else ""


def to_shard_format(extension: str, data: bytes) -> tuple[str, bytes]:
    """Extension and bytes of an image in a shard: JPEG, PNG and WebP as they are, others losslessly as PNG.

    Args:
        extension: Extension of the image file.
        data: Bytes of the file.

    Raises:
        BadSampleError: If the image is empty, damaged, too large or an animation, or Pillow does not read its format.
    """
    if not data:
        raise BadSampleError("the image is empty")
    found = image_format(data)
    if found:
        name = _RENAMED.get(extension, extension)
        return (name if name in IMAGE_EXTENSIONS else found), data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that it tolerates; check_pixels decides on the size
        return "png", _encode(_open(extension, data))


def _open(extension: str, data: bytes) -> Image.Image:
    """The only frame of an image, upright, in a mode that PNG has."""
    try:
        image = Image.open(io.BytesIO(data), formats=_readable(extension, data))
    except UnidentifiedImageError:
        if extension in (*IMAGE_EXTENSIONS, *_RENAMED):
            raise BadSampleError("the image's header cannot be read") from None
        raise BadSampleError(NOT_AN_IMAGE) from None
    except Exception as error:  # Pillow's readers raise almost any exception on damaged bytes
        raise BadSampleError(f"the image cannot be decoded ({error})") from error
    check_pixels(*image.size)
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise BadSampleError(f"the image has {frames} frames or pages; save the one to train on as PNG")
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as error:
        raise BadSampleError(f"the image cannot be decoded ({error})") from error
    if upright.mode in _SAFE_MODES:
        upright.info.pop("icc_profile", None)  # it describes the colors of the other mode
        upright = upright.convert(_SAFE_MODES[upright.mode])
    if upright.mode not in _KEPT_MODES:
        raise BadSampleError(f"the image has the color mode {upright.mode}, which PNG lacks; convert it to RGB")
    return upright


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG")
    except Exception as error:
        raise BadSampleError(f"the image cannot be saved as PNG ({error})") from error
    return buffer.getvalue()


def _readable(extension: str, data: bytes) -> list[str]:
    """The formats that this Pillow may open.

    Raises:
        BadSampleError: If the image is HEIC and pillow-heif is not installed.
    """
    Image.init()
    if data[4:12] in _HEIF and "HEIF" not in Image.OPEN:
        try:
            import_module("pillow_heif").register_heif_opener()
        except ImportError:
            reason = "HEIC needs another package: pip install pillow-heif, or convert the image to JPEG or PNG"
            raise BadSampleError(reason) from None
    found = [name for name in _FORMATS if name in Image.OPEN]
    return [*found, "TGA"] if extension == "tga" else found  # TGA has no signature, so anything may look like it
