"""Decode image bytes to upright pixels, and read sizes from headers.

libjpeg-turbo (simplejpeg) decodes JPEGs, `bands.py` arrays and TIFF of several bands, and PIL everything else, also JPEGs
that libjpeg-turbo refuses. PIL reads HEIC if the package pillow-heif is installed. Orientation tags are applied. With three
channels alpha is dropped, and palettes, grey and CMYK become 8-bit RGB; with one, colour becomes grey. Any other number has
to be that of the image. Animations give their first frame. Images with more than 8 bits per channel are scaled by
`data.intensity_range` (`intensity.py`) and refused without one. Bytes that cannot be decoded raise `UnreadableImageError`.
"""

import dataclasses
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import AvifImagePlugin, ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from hvp_ray.config import DataConfig
from hvp_ray.data.bands import decode_bands, holds_bands, read_band_size
from hvp_ray.data.image_limits import (
    JpegHeader,
    check_bytes,
    check_opened,
    check_scans,
    has_late_metadata,
    has_too_many_entries,
    jpeg_frame,
    read_jpeg_header,
)
from hvp_ray.data.intensity import Intensities, IntensityRange, decode_intensities, kind_of_intensities, upright
from hvp_ray.data.unread_formats import describe_unread, unread_jpeg
from hvp_ray.errors import UnreadableImageError, first_line

_JPEG_MAGIC = b"\xff\xd8\xff"
_EXIF = b"Exif\x00\x00"
_MAX_EXIF_BYTES = 65_536
_ROWS_PER_BLOCK_PIXELS = 2**20
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # view workers have one core each


def _heif_formats() -> tuple[str, ...]:
    """Register the package pillow-heif if it is installed; return the formats that it reads."""
    if find_spec("pillow_heif") is None:
        return ()
    plugin: Any = import_module("pillow_heif")
    plugin.options.DECODE_THREADS = 1
    plugin.register_heif_opener()
    return ("HEIF",)


_PIL_FORMATS = (*_heif_formats(), "JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF")
"""Formats that PIL may open: only images, without formats that run another program. HEIF goes before AVIF, which accepts its
containers too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    height: int
    width: int
    is_plain_jpeg: bool
    image: bytes
    """Bytes to decode, without an EXIF block of too many entries."""


def read_size(image: bytes, *, max_pixels: int, channels: int = 3) -> tuple[int, int]:
    """Return (height, width) in px of the upright image, from its header alone.

    Raises:
        UnreadableImageError: no image, more than `max_pixels` pixels, or far slower to decode than its size.
    """
    if holds_bands(image, channels=channels):
        return read_band_size(image, channels=channels, max_pixels=max_pixels)
    header = _read_header(image, max_pixels)
    return header.height, header.width


def decode_pixels(image: bytes, data: DataConfig) -> NDArray[np.uint8]:
    """Decode to upright pixels, [H, W, data.channels] uint8, contiguous.

    Raises:
        UnreadableImageError: as `decode_rgb`, or the image has another number of channels.
    """
    return _decode_levels(image, data.max_image_pixels, data.intensity_range, data.channels)


def decode_rgb(image: bytes, *, max_pixels: int, intensity_range: IntensityRange | None = None) -> NDArray[np.uint8]:
    """Decode to upright RGB, [H, W, 3] uint8, contiguous.

    Args:
        image: encoded.
        max_pixels: images with more are refused.
        intensity_range: black and white of images with more than 8 bits per channel (`data.intensity_range`). None: such
            images are decoded and then refused. The search for images that crash the decoder relies on that.

    Raises:
        UnreadableImageError: the bytes are no image or damaged, or the image is too large or too slow to decode.
    """
    return _decode_levels(image, max_pixels, intensity_range, 3)


def _decode_levels(
    image: bytes, max_pixels: int, intensity_range: IntensityRange | None, channels: int
) -> NDArray[np.uint8]:
    decoded = _decode(image, max_pixels, channels)
    if isinstance(decoded, Intensities):
        if intensity_range is None:
            raise UnreadableImageError(
                f"it holds {decoded.kind}, but data.intensity_range is not set; set it to the values of black and white"
            )
        decoded = decoded.to_levels(intensity_range, grey_channels=3 if channels == 3 else 1)
    match decoded.shape[2], channels:
        case found, wanted if found == wanted:
            return np.ascontiguousarray(decoded)
        case 1, 3:
            return np.repeat(decoded, 3, axis=2)
        case 3, 1:
            return np.array(Image.fromarray(np.ascontiguousarray(decoded)).convert("L"))[..., None]
    raise UnreadableImageError(f"an image of {decoded.shape[2]} channel(s), but data.channels={channels}")


def read_intensities(image: bytes, *, max_pixels: int, channels: int = 3) -> Intensities | None:
    """Decode an image with more than 8 bits per channel, in its own units; None: its header says 8 bits or fewer.

    Raises:
        UnreadableImageError: as `decode_rgb`.
    """
    if image.startswith(_JPEG_MAGIC):
        return None
    if not holds_bands(image, channels=channels):
        with _quiet_pil(), _open(image, max_pixels) as opened:
            if kind_of_intensities(opened, image) is None:
                return None
    decoded = _decode(image, max_pixels, channels)
    return decoded if isinstance(decoded, Intensities) else None


def check_decodes(image: bytes, *, max_pixels: int, channels: int = 3) -> None:
    """Check that an image can be decoded, with any intensity range.

    Raises:
        UnreadableImageError: as `decode_rgb`.
    """
    _decode_levels(image, max_pixels, (0.0, 1.0), channels)


def _decode(image: bytes, max_pixels: int, channels: int) -> NDArray[np.uint8] | Intensities:
    if holds_bands(image, channels=channels):
        bands = decode_bands(image, channels=channels, max_pixels=max_pixels)
        values = upright(bands.values, bands.orientation)
        if bands.kind is not None:
            return Intensities(values=values, kind=bands.kind, white_is_zero=bands.white_is_zero)
        levels = np.array(values, np.uint8, order="C")  # torch warns of read-only memory
        return ~levels if bands.white_is_zero else levels
    header = _read_header(image, max_pixels)
    decoded: NDArray[np.uint8] | Intensities | None = None
    if header.is_plain_jpeg:
        decoded = _decode_plain_jpeg(header.image)
    if decoded is None:
        decoded = _decode_with_pil(header.image, max_pixels, channels)
    shape = decoded.values.shape if isinstance(decoded, Intensities) else decoded.shape
    if shape[:2] != (header.height, header.width):
        raise UnreadableImageError(f"the header says {header.width} x {header.height} px, decoding gives {shape}")
    return decoded


def is_plain_jpeg(image: bytes, *, max_pixels: int) -> bool:
    """Tell whether the image is an upright grey or colour JPEG of 8 bits, which all JPEG decoders treat alike.

    Raises:
        UnreadableImageError: a JPEG that `read_size` refuses.
    """
    if not image.startswith(_JPEG_MAGIC):
        return False
    header = _read_header(image, max_pixels)
    if not header.is_plain_jpeg or header.image is not image:
        return False
    frame = jpeg_frame(image)
    return frame is not None and frame[1] == 8


def _read_header(image: bytes, max_pixels: int) -> _Header:
    jpeg = _read_jpeg_header(image)
    if jpeg is not None and _has_excessive_exif(image, jpeg):
        front = image[: jpeg.first_scan].replace(_EXIF, bytes(len(_EXIF)))
        image, jpeg = front + image[jpeg.first_scan :], dataclasses.replace(jpeg, exif=None)
    size = None if jpeg is None else _jpeg_size(image, jpeg)
    height, width = size or _pil_size(image, max_pixels)
    if height < 1 or width < 1:
        raise UnreadableImageError(f"an image of {width} x {height} px has no pixels")
    if height * width > max_pixels:
        raise UnreadableImageError(f"{width} x {height} px is more than data.max_image_pixels={max_pixels}")
    if jpeg is not None:
        check_scans(image, jpeg, num_pixels=height * width, max_pixels=max_pixels)
    return _Header(height=height, width=width, is_plain_jpeg=size is not None, image=image)


def _read_jpeg_header(image: bytes) -> JpegHeader | None:
    return read_jpeg_header(image) if image.startswith(_JPEG_MAGIC) else None


def _has_excessive_exif(image: bytes, header: JpegHeader) -> bool:
    return header.exif is not None and has_too_many_entries(image[header.exif : header.exif + _MAX_EXIF_BYTES])


def _jpeg_size(image: bytes, header: JpegHeader) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that simplejpeg may decode; None: PIL decodes it."""
    if header.exif is not None and _has_orientation(image):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    return (height, width) if colorspace in ("YCbCr", "Gray", "GRAY", "RGB") else None


def _has_orientation(image: bytes) -> bool:
    try:
        with _quiet_pil(), Image.open(io.BytesIO(image), formats=("JPEG",)) as opened:
            return opened.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    except Exception:  # noqa: BLE001 (PIL's parsers raise many types; decoding reports the problem)
        return False


def _decode_plain_jpeg(image: bytes) -> NDArray[np.uint8] | None:
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(image, colorspace="RGB")
    except ValueError:
        return None  # PIL accepts JPEGs with harmless defects and refuses truncated ones
    return pixels


@contextmanager
def _quiet_pil() -> Iterator[None]:
    """Silence PIL: a hostile file can make it warn thousands of times, and we limit pixels ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(image: bytes, max_pixels: int) -> ImageFile.ImageFile:
    if not image:
        raise UnreadableImageError(
            "there are no bytes: the file is empty (0 bytes), missing or forbidden, a null, or over data.max_image_mib"
        )
    try:
        check_bytes(image, max_pixels=max_pixels)
        opened = Image.open(io.BytesIO(image), formats=_PIL_FORMATS)
        check_opened(opened, image)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        # "Image size (900000000 pixels) exceeds limit of 178956970 pixels, could be ..."
        size = first_line(error).split(" exceeds")[0]
        raise UnreadableImageError(f"{size} is more than data.max_image_pixels={max_pixels}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(describe_unread(image)) from error
    except Exception as error:
        raise UnreadableImageError(f"not an image that can be decoded: {first_line(error)}") from error
    return opened


def _pil_size(image: bytes, max_pixels: int) -> tuple[int, int]:
    with _quiet_pil(), _open(image, max_pixels) as opened:
        width, height = opened.size
        if height * width > max_pixels:  # check first: reading metadata may decode
            raise UnreadableImageError(f"{width} x {height} px is more than data.max_image_pixels={max_pixels}")
        orientation = _orientation(opened, image)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _orientation(opened: ImageFile.ImageFile, image: bytes) -> int:
    """Return the orientation tag that decoding does not apply; 1: upright, or no readable tag."""
    if isinstance(opened, TiffImagePlugin.TiffImageFile) and ExifTags.Base.Orientation in opened.tag_v2:
        return 1  # PIL applies it, and its size is upright
    try:
        if opened.format == "PNG" and has_late_metadata(image):
            opened.load()
        for name in ("exif", "Raw profile type exif"):
            block = opened.info.get(name)
            if block and has_too_many_entries(block if isinstance(block, bytes) else _from_hex(block)):
                del opened.info[name]
        # `PngImageFile.getexif` would decode every PNG without EXIF.
        exif = Image.Image.getexif(opened) if opened.format == "PNG" else opened.getexif()
        orientation: int = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 (a damaged EXIF block does not make pixels unreadable)
        return 1
    return orientation


def _from_hex(profile: str) -> bytes:
    """Return the EXIF block of a PNG's text chunk: three lines, then hexadecimal digits."""
    return bytes.fromhex("".join(profile.split("\n")[3:]))


def _decode_with_pil(image: bytes, max_pixels: int, channels: int) -> NDArray[np.uint8] | Intensities:
    with _quiet_pil(), _open(image, max_pixels) as opened:
        try:
            kind = kind_of_intensities(opened, image)
            if kind is not None:
                return decode_intensities(
                    opened, image, kind, orientation=_orientation(opened, image), with_alpha=channels == 4
                )
            opened.load()
            _orientation(opened, image)  # drops EXIF that is slow to read
            ImageOps.exif_transpose(opened, in_place=True)
            return _to_rgb(opened) if channels in (1, 3) else _to_bands(opened)
        except UnreadableImageError:
            raise
        except Exception as error:
            reason = unread_jpeg(image) or f"cannot be decoded: {first_line(error)}"
            raise UnreadableImageError(reason) from error


def _to_bands(image: Image.Image) -> NDArray[np.uint8]:
    """Return the bands as they are, [H, W, C]; palettes and single bits become grey or RGB."""
    if image.mode in ("1", "P", "PA"):
        image = image.convert({"1": "L", "P": "RGB", "PA": "RGBA"}[image.mode])
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert to [H, W, 3] in blocks of rows, so that a large image is never in memory in several modes."""
    num_rows = max(1, _ROWS_PER_BLOCK_PIXELS // max(1, image.width))
    if image.height <= num_rows:
        return _block_to_rgb(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        pixels[top:bottom] = _block_to_rgb(image.crop((0, top, image.width, bottom)))
    return pixels


def _block_to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
