"""Images of any number of channels: NumPy arrays (.npy), and TIFF files of several bands, read by tifffile.

Pillow and libjpeg-turbo read grey, RGB and an alpha channel at most. An array is [height, width] or [height, width,
channels]; [channels, height, width] is recognised if its last axis has another length than `data.channels`. A TIFF may hold
its bands interleaved, in planes, or as one page each. Called by `decode.py`.
"""

import io
import math
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvp_ray.data.image_limits import check_tiff_tiles
from hvp_ray.errors import UnreadableImageError, first_line

_NPY_MAGIC = b"\x93NUMPY"
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_KINDS = {"u": "unsigned integers", "i": "signed integers", "f": "floating-point numbers"}
_MINISWHITE = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bands:
    """Values of an image, in the units of its file."""

    values: NDArray[np.generic]
    """[H, W, C]."""
    orientation: int = 1
    """EXIF orientation that is still to be applied."""
    white_is_zero: bool = False
    """Whether small values are bright."""

    @property
    def kind(self) -> str | None:
        """Type of the values, for instance "16-bit unsigned integers"; None: unsigned integers of 8 bits."""
        dtype = self.values.dtype
        return None if dtype == np.uint8 else f"{8 * dtype.itemsize}-bit {_KINDS[dtype.kind]}"


def holds_bands(image: bytes, *, channels: int) -> bool:
    """Tell whether this module reads the image: an array; with other than 1 or 3 channels also a TIFF."""
    return image.startswith(_NPY_MAGIC) or (channels not in (1, 3) and image.startswith(_TIFF_MAGICS))


def read_band_size(image: bytes, *, channels: int, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) in px of the upright image, from its header alone.

    Raises:
        UnreadableImageError: the header is damaged, or the image has more than `max_pixels` pixels.
    """
    if image.startswith(_NPY_MAGIC):
        return _array_header(image, channels, max_pixels).size
    with _opened_tiff(image) as file:
        return _tiff_header(file, channels, max_pixels).size


def decode_bands(image: bytes, *, channels: int, max_pixels: int) -> Bands:
    """Return the values of an image that `holds_bands`.

    Raises:
        UnreadableImageError: it is damaged or too large, or has another number of channels than `channels`, which for
            an array may also be 1 or 3.
    """
    if image.startswith(_NPY_MAGIC):
        return _decode_array(image, _array_header(image, channels, max_pixels))
    with _opened_tiff(image) as file:
        return _decode_tiff(_tiff_header(file, channels, max_pixels))


@dataclass(frozen=True, kw_only=True, slots=True)
class _ArrayHeader:
    shape: tuple[int, ...]
    is_column_major: bool
    dtype: np.dtype[Any]
    offset: int
    channels_first: bool

    @property
    def size(self) -> tuple[int, int]:
        return (self.shape[1], self.shape[2]) if self.channels_first else (self.shape[0], self.shape[1])


def _array_header(image: bytes, channels: int, max_pixels: int) -> _ArrayHeader:
    file = io.BytesIO(image)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_column_major, dtype = read(file)
    except Exception as error:
        raise UnreadableImageError(f"a NumPy array with a damaged header: {first_line(error)}") from error
    if dtype.kind not in _KINDS or dtype.itemsize > 8:
        raise UnreadableImageError(f"a NumPy array of {dtype}; expected integers or floating-point numbers")
    counts = (channels, 1, 3) if channels in (1, 3) else (channels,)
    channels_first = len(shape) == 3 and shape[-1] not in counts and shape[0] in counts
    if len(shape) == 3 and not channels_first and shape[-1] not in counts:
        raise UnreadableImageError(f"a NumPy array of {_product(shape)}, in which no axis has data.channels={channels}")
    if len(shape) not in (2, 3) or (len(shape) == 2 and 1 not in counts):
        raise UnreadableImageError(f"a NumPy array of {_product(shape)}; expected height x width x {channels}")
    header = _ArrayHeader(
        shape=shape,
        is_column_major=is_column_major,
        dtype=dtype,
        offset=file.tell(),
        channels_first=channels_first,
    )
    _check_size(*header.size, max_pixels)
    expected = math.prod(shape) * dtype.itemsize
    if len(image) - header.offset < expected:
        raise UnreadableImageError(f"a NumPy array cut short: {len(image) - header.offset} of {expected} bytes")
    return header


def _decode_array(image: bytes, header: _ArrayHeader) -> Bands:
    values = np.frombuffer(image, header.dtype, math.prod(header.shape), header.offset)
    values = values.reshape(header.shape, order="F" if header.is_column_major else "C")
    if values.ndim == 2:
        values = values[..., None]
    return Bands(values=np.moveaxis(values, 0, -1) if header.channels_first else values)


@dataclass(frozen=True, kw_only=True, slots=True)
class _TiffHeader:
    size: tuple[int, int]
    pages: tuple[Any, ...]
    """tifffile's; one with all bands, or one for each band."""
    orientation: int


def _opened_tiff(image: bytes) -> Any:
    if find_spec("tifffile") is None:
        raise UnreadableImageError(
            "a TIFF of several bands needs the package tifffile: pip install 'hvp-ray[bands]', on every node"
        )
    tifffile: Any = import_module("tifffile")
    try:
        return tifffile.TiffFile(io.BytesIO(image))
    except Exception as error:
        raise UnreadableImageError(f"a TIFF with a damaged header: {first_line(error)}") from error


def _tiff_header(file: Any, channels: int, max_pixels: int) -> _TiffHeader:
    try:
        first = file.pages[0]
        pages = (first,) if first.samplesperpixel > 1 or channels == 1 else _band_pages(file, channels)
        found = first.samplesperpixel if len(pages) == 1 else len(pages)
        height, width = int(first.imagelength), int(first.imagewidth)
        tile = (int(first.tilelength), int(first.tilewidth)) if first.is_tiled else (0, 0)
        orientation = int(first.tags[274].value) if 274 in first.tags else 1
        shapes = {(page.imagelength, page.imagewidth, page.dtype) for page in pages}
    except Exception as error:
        raise UnreadableImageError(f"a TIFF with a damaged header: {first_line(error)}") from error
    if found != channels:
        raise UnreadableImageError(f"a TIFF of {found} bands, but data.channels={channels}")
    if len(shapes) > 1:
        raise UnreadableImageError(f"a TIFF of {found} pages of different sizes or types; expected one for each band")
    if first.dtype is None or first.dtype.kind not in _KINDS:
        raise UnreadableImageError(f"a TIFF of {first.dtype}; expected integers or floating-point numbers")
    _check_size(height, width, max_pixels)
    check_tiff_tiles((height, width), tile)
    return _TiffHeader(
        size=(width, height) if orientation in (5, 6, 7, 8) else (height, width), pages=pages, orientation=orientation
    )


def _band_pages(file: Any, channels: int) -> tuple[Any, ...]:
    """Return the first pages, one more than `channels` at most; a chain of pages may be endless."""
    pages = []
    for index in range(channels + 1):
        try:
            pages.append(file.pages[index])
        except IndexError:
            break
    return tuple(pages)


def _decode_tiff(header: _TiffHeader) -> Bands:
    first = header.pages[0]
    try:
        if len(header.pages) > 1:
            values = np.stack([page.asarray().reshape(page.imagelength, page.imagewidth) for page in header.pages], -1)
        else:
            values = first.asarray()
            in_planes = int(first.planarconfig) != 1
            values = np.moveaxis(values, 0, -1) if in_planes else values
            values = values.reshape(first.imagelength, first.imagewidth, first.samplesperpixel)
    except Exception as error:
        raise UnreadableImageError(f"a TIFF that cannot be decoded: {first_line(error)}") from error
    return Bands(values=values, orientation=header.orientation, white_is_zero=first.photometric == _MINISWHITE)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise UnreadableImageError(f"an image of {width} x {height} px has no pixels")
    if height * width > max_pixels:
        raise UnreadableImageError(f"{width} x {height} px is more than data.max_image_pixels={max_pixels}")


def _product(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
