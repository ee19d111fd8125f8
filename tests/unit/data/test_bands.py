"""Images of any number of channels: every format made here, its values checked; damaged and hostile files refused."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hvp_ray.config import DataConfig
from hvp_ray.data.decode import decode_pixels, read_intensities, read_size
from hvp_ray.errors import ConfigError, UnreadableImageError
from tests.helpers import encode

tifffile: Any = pytest.importorskip("tifffile", reason="the package tifffile (extra `bands`) is not installed")

HEIGHT, WIDTH = 20, 26


def _data(channels: int, **limits: Any) -> DataConfig:
    return DataConfig(source="list", channels=channels, **limits)


def _values(channels: int, dtype: type[np.generic] = np.uint8) -> NDArray[Any]:
    generator = np.random.default_rng(channels)
    return generator.integers(0, 200, (HEIGHT, WIDTH, channels)).astype(dtype)


def _npy(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _tiff(values: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="minisblack", **options)
    return buffer.getvalue()


def _tiff_of_pages(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for band in np.moveaxis(values, -1, 0):
            writer.write(band, photometric="minisblack", metadata=None)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[NDArray[Any]], bytes]] = {
    "npy": _npy,
    "npy, columns first": lambda values: _npy(np.asfortranarray(values)),
    "npy, channels first": lambda values: _npy(np.moveaxis(values, -1, 0)),
    "npy, big-endian": lambda values: _npy(values.astype(values.dtype.newbyteorder(">"))),
    "tiff, interleaved": lambda values: _tiff(values, planarconfig="contig"),
    "tiff, planes": lambda values: _tiff(np.moveaxis(values, -1, 0), planarconfig="separate"),
    "tiff, deflate and predictor": lambda values: _tiff(
        values, planarconfig="contig", compression="deflate", predictor=True
    ),
    "tiff, LZW tiles": lambda values: _tiff(values, planarconfig="contig", compression="lzw", tile=(16, 16)),
    "tiff, one page for each band": _tiff_of_pages,
    "tiff, big": lambda values: _tiff(values, planarconfig="contig", bigtiff=True),
}


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_file(name: str, channels: int) -> None:
    values = _values(channels)
    image = FORMATS[name](values)
    assert read_size(image, max_pixels=1_000, channels=channels) == (HEIGHT, WIDTH)
    assert np.array_equal(decode_pixels(image, _data(channels)), values)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("name", ["npy", "npy, big-endian", "tiff, deflate and predictor", "tiff, planes"])
def test_more_than_8_bits_are_scaled_by_the_range_and_refused_without_one(name: str, dtype: Any) -> None:
    values = _values(5, dtype)
    image = FORMATS[name](values)
    levels = decode_pixels(image, _data(5, intensity_range=(50.0, 150.0)))
    expected = np.clip((values.astype(np.float64) - 50.0) / 100.0, 0.0, 1.0) * 255.0
    assert np.array_equal(levels, np.rint(expected).astype(np.uint8))
    with pytest.raises(UnreadableImageError, match="data.intensity_range is not set"):
        decode_pixels(image, _data(5))
    found = read_intensities(image, max_pixels=1_000, channels=5)
    assert found is not None and np.array_equal(found.values, values)


def test_ramp_of_16_bits_keeps_its_order() -> None:
    ramp = np.repeat(np.arange(0, 65_536, 64, dtype=np.uint16).reshape(32, 32, 1), 4, axis=2)
    levels = decode_pixels(_tiff(ramp, planarconfig="contig"), _data(4, intensity_range=(0.0, 65_535.0)))
    assert (np.diff(levels[..., 0].ravel().astype(int)) >= 0).all()
    assert (levels.min(), levels.max()) == (0, 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_one_channel_is_the_grey_of_an_image(kind: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
    image = encode(grey, kind)
    assert np.array_equal(
        decode_pixels(image, _data(1))[..., 0], np.asarray(Image.open(io.BytesIO(image)).convert("L"))
    )
    colour = encode(_values(3), kind)
    expected = np.asarray(Image.open(io.BytesIO(colour)).convert("RGB").convert("L"))
    assert np.array_equal(decode_pixels(colour, _data(1))[..., 0], expected)


def test_grey_of_16_bits_and_arrays_convert_between_one_channel_and_three() -> None:
    grey = _values(1, np.uint16)
    scale = {"intensity_range": (0.0, 199.0)}
    expected = np.rint(grey / 199.0 * 255.0).astype(np.uint8)
    for image in (encode(grey[..., 0]), _npy(grey), _npy(grey[..., 0]), _tiff(grey[..., 0])):
        assert np.array_equal(decode_pixels(image, _data(1, **scale)), expected)
        assert np.array_equal(decode_pixels(image, _data(3, **scale)), np.repeat(expected, 3, axis=2))
    colour = _values(3)
    assert np.array_equal(decode_pixels(_npy(colour), _data(3)), colour)
    assert np.array_equal(decode_pixels(_npy(colour), _data(1)), decode_pixels(encode(colour), _data(1)))


def test_alpha_is_a_channel_where_it_is_asked_for() -> None:
    pixels, palette = _values(4), Image.fromarray(_values(4)).quantize(8)
    assert np.array_equal(decode_pixels(encode(pixels), _data(4)), pixels)
    assert np.array_equal(decode_pixels(encode(pixels), _data(3)), pixels[..., :3])
    both = Image.fromarray(pixels[..., 0]), Image.fromarray(pixels[..., 1])
    with_alpha = io.BytesIO()
    Image.merge("LA", both).save(with_alpha, "PNG")
    assert np.array_equal(decode_pixels(with_alpha.getvalue(), _data(2)), pixels[..., :2])
    quantized = io.BytesIO()
    palette.save(quantized, "PNG")
    with pytest.raises(UnreadableImageError, match=r"an image of 3 channel\(s\), but data.channels=4"):
        decode_pixels(quantized.getvalue(), _data(4))


def test_orientation_and_white_is_zero_are_applied() -> None:
    values = _values(5)
    turned = _tiff(values, planarconfig="contig", extratags=[(274, "H", 1, 6, True)])
    assert read_size(turned, max_pixels=1_000, channels=5) == (WIDTH, HEIGHT)
    assert np.array_equal(decode_pixels(turned, _data(5)), np.rot90(values, -1))
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="miniswhite", planarconfig="contig")
    assert np.array_equal(decode_pixels(buffer.getvalue(), _data(5)), 255 - values)


@pytest.mark.parametrize(
    ("image", "channels", "reason"),
    [
        (_npy(_values(5)), 4, "20 x 26 x 5, in which no axis has data.channels=4"),
        (_npy(_values(5)), 3, "no axis has data.channels=3"),
        (_npy(_values(1)[..., 0]), 5, "a NumPy array of 20 x 26; expected height x width x 5"),
        (_npy(np.float64(3.0)), 5, "a NumPy array of one number"),
        (_npy(np.zeros((4, 4, 5), np.complex64)), 5, "a NumPy array of complex64"),
        (_npy(np.zeros((0, 4, 5), np.uint8)), 5, "has no pixels"),
        (_npy(np.zeros((40, 40, 5), np.uint8)), 5, "40 x 40 px is more than data.max_image_pixels=1000"),
        (_tiff(np.zeros((40, 40, 5), np.uint8), planarconfig="contig"), 5, "40 x 40 px is more than"),
        (_tiff(_values(5), planarconfig="contig"), 4, "a TIFF of 5 bands, but data.channels=4"),
        (_tiff_of_pages(_values(5)), 4, "a TIFF of 5 bands, but data.channels=4"),
        (encode(_values(3)), 5, r"an image of 3 channel\(s\), but data.channels=5"),
        (encode(_values(3), "JPEG"), 2, r"an image of 3 channel\(s\), but data.channels=2"),
        (_npy(_values(5))[:200], 5, "cut short: 72 of 2600 bytes"),
        (b"\x93NUMPY" + bytes(90), 5, "a damaged header"),
    ],
)
def test_image_that_does_not_fit_is_refused_with_the_reason(image: bytes, channels: int, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode_pixels(image, _data(channels, max_image_pixels=1_000))


def test_pages_of_different_sizes_are_refused() -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(np.zeros((20, 26), np.uint8), metadata=None)
        writer.write(np.zeros((10, 13), np.uint8), metadata=None)
    with pytest.raises(UnreadableImageError, match="2 pages of different sizes"):
        decode_pixels(buffer.getvalue(), _data(2))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the array was unpickled",))


def test_pickled_objects_are_never_loaded() -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (4, 4, 5)})
    with pytest.raises(UnreadableImageError, match="a NumPy array of object"):
        decode_pixels(header.getvalue() + pickle.dumps(_Bomb()), _data(5))


@pytest.mark.parametrize("name", ["npy", "tiff, deflate and predictor", "tiff, LZW tiles", "tiff, planes"])
def test_damage_is_found_or_harmless(name: str) -> None:
    """Cut and altered files raise `UnreadableImageError` and nothing else, and decode to the size that they announce."""
    whole, generator = FORMATS[name](_values(5)), np.random.default_rng(0)
    broken = [whole[:length] for length in range(0, len(whole), 97)]
    for _ in range(150):
        changed = bytearray(whole)
        for place in generator.integers(0, min(len(whole), 400), 3):
            changed[place] = generator.integers(0, 256)
        broken.append(bytes(changed))
    for image in broken:
        try:
            size = read_size(image, max_pixels=10_000, channels=5)
            pixels = decode_pixels(image, _data(5, max_image_pixels=10_000, intensity_range=(0.0, 255.0)))
        except UnreadableImageError:
            continue
        assert pixels.shape == (*size, 5)


@pytest.mark.parametrize("channels", [0, -1, 33])
def test_number_of_channels_has_limits(channels: int) -> None:
    with pytest.raises(ConfigError, match=f"data.channels={channels} is not allowed: 1 to 32"):
        _data(channels)
