"""Encoded bytes -> upright RGB pixels, and the header before that.

JPEG goes through libjpeg-turbo (simplejpeg), everything else, and every JPEG that it does not take, through PIL.
Orientation tags are applied; alpha is dropped; palettes, grey, CMYK and 16-bit images become 8-bit RGB; of an
animation the first frame is taken. Anything that cannot be decoded raises `UnreadableImageError`.
"""

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from hvp_ray.errors import UnreadableImageError

_JPEG_MAGIC = b"\xff\xd8\xff"
_HEADER_SEARCH_BYTES = 65_536
_PIL_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "TGA")
"""Formats that PIL may open: plain images only, none that runs another program."""


def read_size(image: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) in px of the upright image, from the header alone.

    Raises:
        UnreadableImageError: no image, or more than `max_pixels` pixels.
    """
    height, width = _jpeg_size(image) or _pil_size(image, max_pixels)
    if height < 1 or width < 1:
        raise UnreadableImageError(f"an image of {width} x {height} px has no pixels")
    if height * width > max_pixels:
        raise UnreadableImageError(f"{width} x {height} px is more than data.max_image_pixels={max_pixels}")
    return height, width


def decode_rgb(image: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """Decode to upright RGB, [H, W, 3] uint8, contiguous.

    Raises:
        UnreadableImageError: the bytes are no image, are damaged, or the image is too large.
    """
    height, width = read_size(image, max_pixels=max_pixels)
    pixels = _decode_plain_jpeg(image)
    if pixels is None:
        pixels = _decode_with_pil(image, max_pixels)
    if pixels.shape != (height, width, 3):
        raise UnreadableImageError(f"the header says {width} x {height} px, decoding gives {pixels.shape}")
    return pixels


def is_plain_jpeg(image: bytes) -> bool:
    """Tell whether the image is an upright grey or colour JPEG, which every JPEG decoder treats alike."""
    return _jpeg_size(image) is not None


def _jpeg_size(image: bytes) -> tuple[int, int] | None:
    if not image.startswith(_JPEG_MAGIC) or _has_orientation(image):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    return (height, width) if colorspace in ("YCbCr", "Gray", "GRAY", "RGB") else None


def _has_orientation(image: bytes) -> bool:
    if b"Exif\x00\x00" not in image[:_HEADER_SEARCH_BYTES]:
        return False
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    except Exception:  # noqa: BLE001 (PIL's parsers raise many types; the decoder will say what is wrong)
        return False


def _decode_plain_jpeg(image: bytes) -> NDArray[np.uint8] | None:
    if _jpeg_size(image) is None:
        return None
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(image, colorspace="RGB")
    except ValueError:
        return None  # PIL decides: it takes JPEGs with harmless defects and refuses truncated ones
    return pixels


def _open(image: bytes, max_pixels: int) -> Image.Image:
    if not image:
        raise UnreadableImageError("the file is empty (0 bytes)")
    with warnings.catch_warnings():
        # The limit on pixels is ours (data.max_image_pixels) and is checked on the header.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(image), formats=_PIL_FORMATS)
        except Image.DecompressionBombError as error:
            # "Image size (900000000 pixels) exceeds limit of 178956970 pixels, could be ..."
            size = _first_line(error).split(" exceeds")[0]
            raise UnreadableImageError(f"{size} is more than data.max_image_pixels={max_pixels}") from error
        except UnidentifiedImageError as error:
            raise UnreadableImageError("not an image: the bytes have no known format") from error
        except Exception as error:
            raise UnreadableImageError(f"not an image that can be decoded: {_first_line(error)}") from error


def _pil_size(image: bytes, max_pixels: int) -> tuple[int, int]:
    with _open(image, max_pixels) as opened:
        width, height = opened.size
        try:
            orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # noqa: BLE001 (a damaged EXIF block does not make pixels unreadable)
            orientation = 1
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _decode_with_pil(image: bytes, max_pixels: int) -> NDArray[np.uint8]:
    with _open(image, max_pixels) as opened:
        try:
            upright = ImageOps.exif_transpose(opened)
            return np.ascontiguousarray(_to_rgb(upright))
        except UnreadableImageError:
            raise
        except Exception as error:
            raise UnreadableImageError(f"cannot be decoded: {_first_line(error)}") from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16 bits of grey; PIL's own conversion would clip to 255
        values = np.asarray(image).astype(np.int64)
        grey = (np.clip(values, 0, 65_535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
