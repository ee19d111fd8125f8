"""Images with more than 8 bits per channel are scaled by their values, or refused with a reason."""

import importlib.util
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from hvp_ray.data.decode import decode_rgb, read_intensities, read_size
from hvp_ray.errors import ConfigError, UnreadableImageError
from tests.helpers import encode, photograph_like, tiny_config
from tests.unit.data import made_intensities as made
from tests.unit.data.bombs import png_chunk, tiff

LIMIT = 10**7
SHAPE = (48, 64)  # JPEG 2000 needs some pixels


def _ramp(low: float, high: float, kind: str, channels: int = 0) -> np.ndarray:
    """Every value from low to high in a fixed mixed order, [48, 64] or [48, 64, C]."""
    shape = SHAPE + ((channels,) if channels else ())
    count = int(np.prod(shape))
    values = np.linspace(low, high, count)[np.arange(count) * 7919 % count]
    return values.reshape(shape).astype(kind)


TWELVE, FULL = _ramp(0, 4095, "u2"), _ramp(0, 65_535, "u2")
IN_COLOUR = _ramp(0, 65_535, "u2", 3)
TOMOGRAM = _ramp(-1024, 3071, "i2")
IMAGES: dict[str, tuple[Callable[[], bytes], np.ndarray, tuple[float, float]]] = {
    "PNG, 12 bits of grey": (lambda: made.png16(TWELVE), TWELVE, (0.0, 4095.0)),
    "PNG, 10 bits of grey": (lambda: made.png16(TWELVE // 4), TWELVE // 4, (0.0, 1023.0)),
    "PNG, 8 bits in 16": (lambda: made.png16(TWELVE // 16), TWELVE // 16, (0.0, 255.0)),
    "PNG, 16 bits of grey": (lambda: made.png16(FULL), FULL, (0.0, 65_535.0)),
    "PNG, part of the range": (lambda: made.png16(FULL), FULL, (1000.5, 20_000.0)),
    "PNG, RGB": (lambda: made.png16(IN_COLOUR), IN_COLOUR, (0.0, 65_535.0)),
    "PNG, RGB of 12 bits": (lambda: made.png16(IN_COLOUR // 16), IN_COLOUR // 16, (0.0, 4095.0)),
    "PNG, grey and alpha": (lambda: made.png16(np.dstack([TWELVE, FULL])), TWELVE, (0.0, 4095.0)),
    "PNG, RGBA": (lambda: made.png16(np.dstack([IN_COLOUR, FULL])), IN_COLOUR, (0.0, 65_535.0)),
    "PNG, RGB and transparent": (
        lambda: made.png16(IN_COLOUR, extra=png_chunk(b"tRNS", bytes(6))),
        IN_COLOUR,
        (0.0, 65_535.0),
    ),
    "PNG, text after the pixels": (
        lambda: made.png16(TWELVE).replace(
            png_chunk(b"IEND", b""), png_chunk(b"tEXt", b"a\x00b") + png_chunk(b"IEND", b"")
        ),
        TWELVE,
        (0.0, 4095.0),
    ),
    "PGM of 12 bits": (lambda: made.pnm(b"P5", TWELVE, 4095), TWELVE, (0.0, 4095.0)),
    "PGM of 16 bits": (lambda: made.pnm(b"P5", TWELVE, 65_535), TWELVE, (0.0, 4095.0)),
    "PPM of 16 bits": (lambda: made.pnm(b"P6", IN_COLOUR, 65_535), IN_COLOUR, (0.0, 65_535.0)),
    "PPM of 12 bits": (lambda: made.pnm(b"P6", IN_COLOUR // 16, 4095), IN_COLOUR // 16, (0.0, 4095.0)),
    "PFM": (lambda: made.pfm(TWELVE / 4095), (TWELVE / 4095).astype("f4"), (0.0, 1.0)),
    "JPEG 2000, 12 bits": (lambda: made.jpeg2000(TWELVE, precision=12), TWELVE, (0.0, 4095.0)),
    "JPEG 2000, 16 bits": (lambda: made.jpeg2000(FULL, precision=16), FULL, (0.0, 65_535.0)),
    "JPEG 2000, RGB": (lambda: made.jpeg2000(IN_COLOUR // 16, precision=12), IN_COLOUR // 16, (0.0, 4095.0)),
    "AVIF, 10 bits": (lambda: made.avif(TWELVE // 4, depth=10), TWELVE // 4, (0.0, 1023.0)),
    "AVIF, 12 bits": (lambda: made.avif(TWELVE, depth=12), TWELVE, (0.0, 4095.0)),
    "AVIF, RGB of 10 bits": (lambda: made.avif(IN_COLOUR // 64, depth=10), IN_COLOUR // 64, (0.0, 1023.0)),
    "TIFF, uint16 of a microscope": (lambda: made.tiff_of(TWELVE, order=">"), TWELVE, (0.0, 4095.0)),
    "TIFF, LZW": (lambda: made.saved(TWELVE, "TIFF", compression="tiff_lzw"), TWELVE, (0.0, 4095.0)),
    "TIFF, zstd": (lambda: made.saved(TWELVE, "TIFF", compression="zstd"), TWELVE, (0.0, 4095.0)),
    "TIFF, int8": (lambda: made.tiff_of(_ramp(-128, 127, "i1")), _ramp(-128, 127, "i1"), (-128.0, 127.0)),
    "TIFF, int16 of a CT": (lambda: made.tiff_of(TOMOGRAM), TOMOGRAM, (-1024.0, 3071.0)),
    "TIFF, int16 of a CT, big-endian": (lambda: made.tiff_of(TOMOGRAM, order=">"), TOMOGRAM, (-1024.0, 3071.0)),
    "TIFF, CT in a window": (lambda: made.tiff_of(TOMOGRAM), TOMOGRAM, (-160.0, 240.0)),
    "TIFF, int32 of 8 bits": (lambda: made.tiff_of(_ramp(0, 255, "i4")), _ramp(0, 255, "i4"), (0.0, 255.0)),
    "TIFF, uint32": (lambda: made.tiff_of(_ramp(0, 2**32 - 1, "u4")), _ramp(0, 2**32 - 1, "u4"), (0.0, 2.0**32 - 1)),
    "TIFF, float32 of 0 to 1": (lambda: made.tiff_of(_ramp(0, 1, "f4")), _ramp(0, 1, "f4"), (0.0, 1.0)),
    "TIFF, RGB": (lambda: made.tiff_of(IN_COLOUR), IN_COLOUR, (0.0, 65_535.0)),
    "TIFF, RGB, big-endian": (lambda: made.tiff_of(IN_COLOUR, order=">"), IN_COLOUR, (0.0, 65_535.0)),
    "TIFF, RGBA": (lambda: made.tiff_of(np.dstack([IN_COLOUR, FULL])), IN_COLOUR, (0.0, 65_535.0)),
}
"""Name -> file, values that it holds, and black and white."""


def _slow_levels(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """The rule, value by value."""
    levels = [round(255 * min(1.0, max(0.0, (value - black) / (white - black)))) for value in values.ravel().tolist()]
    found = np.array(levels, np.uint8).reshape(values.shape)
    return np.repeat(found[..., None], 3, axis=2) if found.ndim == 2 else found


@pytest.mark.parametrize("name", list(IMAGES))
def test_levels_are_the_values_scaled_by_the_range_and_nothing_else(name: str) -> None:
    make, values, intensity_range = IMAGES[name]
    image = make()
    assert read_size(image, max_pixels=LIMIT) == SHAPE
    levels = decode_rgb(image, max_pixels=LIMIT, intensity_range=intensity_range)
    assert np.array_equal(levels, _slow_levels(values, *intensity_range))
    found = read_intensities(image, max_pixels=LIMIT)
    assert found is not None
    grey_in_three_channels = found.values.ndim > values.ndim
    assert np.array_equal(found.values, np.dstack([values] * 3) if grey_in_three_channels else values)


@pytest.mark.parametrize("name", list(IMAGES))
def test_image_is_refused_without_a_range_and_the_reason_names_the_setting(name: str) -> None:
    with pytest.raises(UnreadableImageError, match=r"^it holds \d+-bit \S+ (integers|numbers),.*data.intensity_range"):
        decode_rgb(IMAGES[name][0](), max_pixels=LIMIT)


def test_separate_planes_of_16_bits_are_refused() -> None:
    """OpenCV reads the first plane as if it were all three."""
    height, width, _ = IN_COLOUR.shape
    content = np.moveaxis(IN_COLOUR, 2, 0).tobytes()
    starts = [8 + plane * 2 * height * width for plane in range(3)]
    tags = {256: [width], 257: [height], 258: [16] * 3, 259: [1], 262: [2], 277: [3], 278: [height], 284: [2]}
    image = tiff(tags | {273: starts, 279: [2 * height * width] * 3}, content)
    with pytest.raises(UnreadableImageError, match="16-bit unsigned integers are in separate planes; save"):
        decode_rgb(image, max_pixels=LIMIT, intensity_range=(0.0, 65_535.0))


def test_white_is_zero_where_the_file_says_so() -> None:
    image = made.tiff_of(TWELVE, photometric=0)
    levels = decode_rgb(image, max_pixels=LIMIT, intensity_range=(0.0, 4095.0))
    assert np.array_equal(levels, 255 - _slow_levels(TWELVE, 0, 4095))


def test_nan_is_black_and_infinities_are_the_ends() -> None:
    values = _ramp(0, 1, "f4")
    values[0, :4] = [np.nan, np.inf, -np.inf, 3e38]
    levels = decode_rgb(made.tiff_of(values), max_pixels=LIMIT, intensity_range=(0.0, 1.0))
    assert levels[0, :4, 0].tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF, grey", "TIFF, RGB", "PNG"])
def test_images_of_16_bits_are_turned_upright(kind: str, orientation: int) -> None:
    values = IN_COLOUR if kind == "TIFF, RGB" else TWELVE
    if kind == "PNG":
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = made.png16(values, extra=png_chunk(b"eXIf", exif.tobytes()[6:]))
    else:
        image = made.tiff_of(values, orientation=orientation)
    upright = {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.swapaxes(0, 1),
        6: np.rot90(values, -1),
        7: values[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(values),
    }[orientation]
    assert read_size(image, max_pixels=LIMIT) == upright.shape[:2]
    assert np.array_equal(
        decode_rgb(image, max_pixels=LIMIT, intensity_range=(0.0, 65_535.0)), _slow_levels(upright, 0, 65_535)
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA", "AVIF"])
def test_range_changes_no_bit_of_an_image_of_8_bits(generator: np.random.Generator, kind: str) -> None:
    image = encode(photograph_like(generator, 60, 80), kind)
    plain = decode_rgb(image, max_pixels=LIMIT)
    assert np.array_equal(decode_rgb(image, max_pixels=LIMIT, intensity_range=(10.0, 20.0)), plain)
    assert read_intensities(image, max_pixels=LIMIT) is None


def test_cmyk_of_16_bits_needs_no_range() -> None:
    """Its values are shares of ink, whatever the number of bits."""
    inks = _ramp(0, 65_535, "u2", 4)
    eight = Image.fromarray((inks >> 8).astype(np.uint8), "CMYK")
    decoded = decode_rgb(made.tiff_of(inks, photometric=5), max_pixels=LIMIT)
    assert np.array_equal(decoded, np.array(eight.convert("RGB")))


def _with_frame(image: bytes, marker: int, bits: int) -> bytes:
    changed = bytearray(image)
    start = image.find(b"\xff\xc0")
    changed[start + 1], changed[start + 4] = marker, bits
    return bytes(changed)


def _box(brand: bytes, *compatible: bytes) -> bytes:
    content = brand + bytes(4) + b"".join(compatible)
    return struct.pack(">I4s", 8 + len(content), b"ftyp") + content + bytes(100)


HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
HEIC = "a HEIC that is damaged" if HAS_HEIF else r"needs the package pillow-heif: pip install 'hvp-ray\[heic\]'"
JPEG = encode(np.zeros((90, 80, 3), np.uint8), "JPEG", comment=b"x" * 9_000)
UNREAD: dict[str, tuple[bytes, str]] = {
    "TIFF of five bands": (
        made.tiff_of(_ramp(0, 9, "u2", 5), photometric=1),
        "a TIFF of 5 bands of 16-bit unsigned integers",
    ),
    "TIFF of seven bands of 8 bits": (
        made.tiff_of(_ramp(0, 9, "u1", 7), photometric=1),
        "a TIFF of 7 bands of 8-bit unsigned integers.*save the three bands",
    ),
    "TIFF of float RGB": (made.tiff_of(_ramp(0, 1, "f4", 3)), "a TIFF of 3 bands of 32-bit floating-point numbers"),
    "TIFF of float64": (
        made.tiff_of(_ramp(0, 1, "f8"), order=">"),
        "a TIFF of 1 band of 64-bit floating-point numbers",
    ),
    "damaged AVIF": (encode(np.zeros((9, 9, 3), np.uint8), "AVIF")[:99], "an AVIF that is damaged"),
    "AVIF of another brand": (_box(b"mif1", b"mif1", b"avif"), "an AVIF that is damaged|cannot be decoded"),
    "HEIC": (_box(b"heic", b"mif1", b"heic"), HEIC),
    "Canon raw": (_box(b"crx ", b"crx "), "a Canon raw image.*convert"),
    "damaged WebP": (b"RIFF\x00\x01\x00\x00WEBPVP8 " + bytes(90), "a WebP that is damaged|could not create decoder"),
    "damaged JPEG 2000": (
        b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(90),
        "a JPEG 2000 that is damaged|cannot be decoded",
    ),
    "film": (_box(b"isom", b"mp42"), "a film"),
    "JPEG XL": (b"\xff\x0a" + bytes(50), "a JPEG XL image.*convert"),
    "JPEG XL in a box": (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(50), "a JPEG XL image.*convert"),
    "JPEG of 12 bits": (_with_frame(JPEG, 0xC1, 12), "a JPEG of 12 bits a channel"),
    "small JPEG of 12 bits": (
        _with_frame(encode(np.zeros((9, 9, 3), np.uint8), "JPEG"), 0xC1, 12),
        "a JPEG of 12 bits a channel",
    ),
    "lossless JPEG": (_with_frame(JPEG, 0xC3, 8), "a lossless JPEG"),
    "JPEG-LS": (_with_frame(JPEG, 0xF7, 8), "a JPEG-LS"),
    "PSD": (b"8BPS" + bytes(90), "a Photoshop document"),
    "EXR": (b"\x76\x2f\x31\x01" + bytes(90), "an OpenEXR image"),
    "DICOM": (bytes(128) + b"DICM" + bytes(90), "a DICOM file"),
    "NumPy": (b"\x93NUMPY" + bytes(90), "a NumPy array"),
    "web page": (b"\n<!DOCTYPE html><html>" + bytes(90), "a web page"),
    "drawing": (b"<?xml version='1.0'?><svg>" + bytes(90), "an SVG or XML file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "anything else": (b"this is a text file named .jpg\n" * 30, "the bytes have no known format"),
}


@pytest.mark.parametrize("name", list(UNREAD))
def test_reason_says_what_an_image_is_that_is_not_read(name: str) -> None:
    image, reason = UNREAD[name]
    with pytest.raises(UnreadableImageError, match=reason):
        decode_rgb(image, max_pixels=LIMIT, intensity_range=(0.0, 1.0))


@pytest.mark.parametrize("black_white", [(5.0, 5.0), (9.0, 2.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_range_that_is_none_is_refused(black_white: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="data.intensity_range=.*black below white"):
        tiny_config("x", data={"intensity_range": black_white})


def test_damaged_image_of_16_bits_is_unreadable() -> None:
    for image in (made.png16(IN_COLOUR), made.tiff_of(IN_COLOUR), made.jpeg2000(IN_COLOUR, precision=16)):
        with pytest.raises(UnreadableImageError):
            decode_rgb(image[: len(image) // 3], max_pixels=LIMIT, intensity_range=(0.0, 1.0))
