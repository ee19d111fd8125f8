"""Images with more than 8 bits per channel: decode their values in their own units, and scale them to 8-bit levels.

A 16-bit file does not define black and white: it may hold 12 bits of a camera, Hounsfield units or reflectances.
`data.intensity_range` defines them for all images of a set. Called by `decode.py`.
"""

import re
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ImageFile, TiffImagePlugin

from hvp_ray.errors import UnreadableImageError

IntensityRange = tuple[float, float]
"""The values that become black (0) and white (255)."""

_LEVELS_AT_ONCE = 2**18
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED = 1, 2
KINDS_OF_NUMBERS = {_UNSIGNED: "unsigned integers", _SIGNED: "signed integers", 3: "floating-point numbers"}
"""Names of the kinds of numbers, by the sample format of a TIFF."""
_AVIF_CONFIGURATION = re.compile(rb"av1C\x81(?=..)", re.DOTALL)
_MAX_CONFIGURATIONS = 1_000
_CMYK = 5
"""Photometric interpretation of a TIFF. All bits set is full ink, so no range is needed."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Intensities:
    """Values of an image with more than 8 bits per channel."""

    values: NDArray[np.generic]
    """[H, W] or [H, W, C], upright, of any type of number, in the units of the file."""
    kind: str
    """Type of the values, for instance "16-bit unsigned integers"."""
    white_is_zero: bool = False
    """Whether small values are bright."""

    def to_levels(self, intensity_range: IntensityRange, *, grey_channels: int = 3) -> NDArray[np.uint8]:
        """Return levels [H, W, C]: black to white becomes 0 to 255, rounded. Values outside are clipped; NaN is black.

        Args:
            intensity_range: black and white.
            grey_channels: C of values [H, W].
        """
        black, white = intensity_range
        num_channels = grey_channels if self.values.ndim == 2 else self.values.shape[2]
        levels = np.empty((*self.values.shape[:2], num_channels), np.uint8)
        rows_at_once = max(1, _LEVELS_AT_ONCE // max(1, self.values.shape[1]))
        for top in range(0, len(levels), rows_at_once):
            rows = self.values[top : top + rows_at_once].astype(np.float64)
            rows = np.nan_to_num(rows, copy=False, nan=black, posinf=white, neginf=black)
            scaled = np.clip((rows - black) / (white - black), 0.0, 1.0)
            scaled = np.rint(255.0 * (1.0 - scaled if self.white_is_zero else scaled))
            levels[top : top + rows_at_once] = scaled[..., None] if scaled.ndim == 2 else scaled
        return levels


def kind_of_intensities(opened: ImageFile.ImageFile, image: bytes) -> str | None:
    """Return the type of an image's values, from its header; None: integers of at most 8 bits.

    Args:
        opened: the image, opened by Pillow and not decoded yet.
        image: its bytes.
    """
    # Arguments of Pillow's decoder: how values are packed, and the largest value of a portable anymap.
    arguments = opened.tile[0].args if opened.tile else ()
    match opened.format:
        case "TIFF":
            assert isinstance(opened, TiffImagePlugin.TiffImageFile)
            bits, number = _number_type(opened)
            if (bits <= 8 and number != _SIGNED) or _tag(opened, _PHOTOMETRIC, 1) == _CMYK:
                return None
            return f"{bits}-bit {KINDS_OF_NUMBERS.get(number, 'numbers')}"
        case "PNG" if "16" in str(arguments):
            return "16-bit unsigned integers"
        case "PPM" if opened.mode == "F":
            return "32-bit floating-point numbers"
        case "PPM" if opened.mode == "I" or (isinstance(arguments, tuple) and arguments[-1] > 255):
            return "16-bit unsigned integers"
        case "JPEG2000":
            precision = _jpeg2000_precision(image)
            return f"{precision}-bit unsigned integers" if precision > 8 else None
        case "AVIF":
            precision = _avif_precision(image)
            return f"{precision}-bit unsigned integers" if precision > 8 else None
        case "HEIF" if opened.info.get("bit_depth", 8) > 8:
            return f"{opened.info['bit_depth']}-bit unsigned integers"
    return None


def decode_intensities(
    opened: ImageFile.ImageFile, image: bytes, kind: str, *, orientation: int, with_alpha: bool = False
) -> Intensities:
    """Return the values of an image that has `kind_of_intensities`.

    Args:
        opened: the image, opened by Pillow and not decoded yet.
        image: its bytes.
        kind: type of the values.
        orientation: EXIF orientation that decoding does not apply.
        with_alpha: keep a fourth channel.

    Raises:
        UnreadableImageError: no library decodes it without losing bits.
    """
    if not isinstance(opened, TiffImagePlugin.TiffImageFile):
        return Intensities(values=upright(_read_with_opencv(image, kind, with_alpha), orientation), kind=kind)
    if len(opened.getbands()) == 1:  # Pillow reads more compressions than OpenCV, but no colour of 16 bits
        return Intensities(
            values=_read_grey_tiff(opened), kind=kind, white_is_zero=_tag(opened, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO
        )
    if _tag(opened, _PLANES, 1) != 1:  # OpenCV would interleave them wrongly
        raise UnreadableImageError(f"its {kind} are in separate planes; save the file with its bands interleaved")
    return Intensities(values=upright(_read_with_opencv(image, kind, with_alpha), orientation), kind=kind)


def _read_grey_tiff(opened: TiffImagePlugin.TiffImageFile) -> NDArray[np.generic]:
    number_type = _number_type(opened)
    opened.load()
    values = np.asarray(opened)
    # Pillow stores these two types as the type of the other sign.
    if number_type == (32, _UNSIGNED):
        return values.view(np.uint32)
    return values.view(np.int8) if number_type == (8, _SIGNED) else values


def _read_with_opencv(image: bytes, kind: str, with_alpha: bool) -> NDArray[np.generic]:  # noqa: FBT001 (passed on)
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        values = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise UnreadableImageError(f"its {kind} cannot be decoded: {error.err}") from error
    finally:
        cv2.utils.logging.setLogLevel(level)
    if values is None or values.dtype == np.uint8:
        raise UnreadableImageError(
            f"its {kind} cannot be decoded: the file is damaged, or compressed in a way that is not read; save it as a "
            f"PNG of 16 bits"
        )
    if values.ndim == 2:
        return values
    return values[..., [2, 1, 0, 3]] if with_alpha and values.shape[2] == 4 else values[..., 2::-1]  # was BGR or BGRA


def upright(values: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """Apply an EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values[::-1] if orientation in (3, 4, 7, 8) else values


def _jpeg2000_precision(image: bytes) -> int:
    """Return the bits of the widest component, from the size segment."""
    start = image.find(b"\xff\x4f\xff\x51") + 40
    num_components = int.from_bytes(image[start : start + 2], "big")
    precisions = image[start + 2 : start + 2 + 3 * num_components : 3]
    return max((precision & 127) + 1 for precision in precisions)


def _avif_precision(image: bytes) -> int:
    """Return the bits of the image or its alpha, whichever has more, from the codec configurations."""
    flags = [image[found.end() + 1] for found in islice(_AVIF_CONFIGURATION.finditer(image), _MAX_CONFIGURATIONS)]
    return max((12 if flag & 0x20 else 10 if flag & 0x40 else 8 for flag in flags), default=8)


def _number_type(opened: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """Return bits and sample format of the first band."""
    return _tag(opened, _BITS, 1), _tag(opened, _SAMPLE_FORMAT, _UNSIGNED)


def _tag(opened: TiffImagePlugin.TiffImageFile, tag: int, default: int) -> int:
    """Return a tag's first value; `default`: it is missing, or no integer."""
    value = opened.tag_v2.get(tag, default)
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, int) else default
