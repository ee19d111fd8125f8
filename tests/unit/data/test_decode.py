"""Decoding of every common kind of image."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from hvp_ray.data.decode import decode_rgb, is_plain_jpeg, read_size
from hvp_ray.errors import UnreadableImageError
from tests.helpers import encode, photograph_like

LIMIT = 10**7


def _decode(image: bytes) -> np.ndarray:
    assert read_size(image, max_pixels=LIMIT) == decode_rgb(image, max_pixels=LIMIT).shape[:2]
    return decode_rgb(image, max_pixels=LIMIT)


def test_jpeg_equals_pil(generator: np.random.Generator) -> None:
    image = encode(photograph_like(generator, 50, 70), "JPEG", quality=90)
    assert np.array_equal(_decode(image), np.array(Image.open(io.BytesIO(image)).convert("RGB")))


def test_png_with_alpha_palette_and_grey_become_rgb(generator: np.random.Generator) -> None:
    rgb = photograph_like(generator, 20, 30)
    alpha = np.dstack([rgb, np.full((20, 30), 77, np.uint8)])
    assert np.array_equal(_decode(encode(alpha)), rgb)
    assert np.array_equal(_decode(encode(rgb[..., 0])), np.repeat(rgb[..., :1], 3, axis=2))
    palette = Image.fromarray(rgb).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert np.array_equal(_decode(buffer.getvalue()), np.array(palette.convert("RGB")))


def test_cmyk_jpeg_is_rgb(generator: np.random.Generator) -> None:
    cmyk = Image.fromarray(photograph_like(generator, 30, 40)).convert("CMYK")
    buffer = io.BytesIO()
    cmyk.save(buffer, "JPEG", quality=95)
    decoded = _decode(buffer.getvalue())
    assert np.abs(decoded.astype(int) - np.array(cmyk.convert("RGB"))).mean() < 3


def test_exif_orientation_is_applied(generator: np.random.Generator) -> None:
    rgb = photograph_like(generator, 40, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise to be upright
    image = encode(rgb, "JPEG", quality=95, exif=exif)
    assert read_size(image, max_pixels=LIMIT) == (64, 40)
    assert np.abs(_decode(image).astype(int) - np.rot90(rgb, -1)).mean() < 4
    assert not is_plain_jpeg(image, max_pixels=LIMIT)


_SAVED: dict[str, tuple[str, tuple[str, ...], dict[str, object]]] = {
    "JPEG": ("JPEG", ("L", "RGB", "CMYK"), {"quality": 90}),
    "progressive JPEG": ("JPEG", ("L", "RGB", "CMYK"), {"progressive": True}),
    "PNG": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA"), {}),
    "WebP": ("WEBP", ("L", "RGB", "RGBA"), {"lossless": True}),
    "AVIF": ("AVIF", ("L", "RGB", "RGBA"), {}),
    "TIFF": ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"), {}),
    "TIFF, LZW": ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"), {"compression": "tiff_lzw"}),
    "TIFF, JPEG": ("TIFF", ("L", "RGB", "CMYK"), {"compression": "jpeg"}),
    "TIFF, fax": ("TIFF", ("1",), {"compression": "group4"}),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", list(_SAVED))
def test_every_mode_and_orientation_is_what_pillow_shows_upright(
    generator: np.random.Generator, name: str, orientation: int
) -> None:
    kind, modes, options = _SAVED[name]
    picture = Image.fromarray(photograph_like(generator, 24, 40))
    for mode in modes:
        exif = Image.Exif()  # saving AVIF takes the tag out of it
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, kind, exif=exif, **options)
        expected = ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")
        assert expected.size == ((24, 40) if orientation >= 5 else (40, 24))
        assert np.array_equal(_decode(buffer.getvalue()), np.array(expected)), mode


def test_orientation_is_read_behind_a_long_profile(generator: np.random.Generator) -> None:
    """The EXIF block of a JPEG may begin after the first 64 KiB."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encode(photograph_like(generator, 24, 40), "JPEG", exif=exif)
    profile = b"\xff\xe2" + (60_002).to_bytes(2, "big") + bytes(60_000)
    assert np.array_equal(_decode(image[:2] + 2 * profile + image[2:]), _decode(image))
    assert _decode(image).shape == (40, 24, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_is_garbage_is_ignored(generator: np.random.Generator, kind: str) -> None:
    """The number of entries is what two bytes of garbage say; Pillow warns and reads the image."""
    rgb = photograph_like(generator, 24, 40)
    garbage = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + b"\xee" * 40
    image = encode(rgb, kind, exif=garbage)
    assert np.array_equal(_decode(image), _decode(encode(rgb, kind)))
    assert not is_plain_jpeg(image, max_pixels=LIMIT)


def test_first_frame_of_an_animated_gif() -> None:
    frames = [Image.new("RGB", (12, 10), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert _decode(buffer.getvalue())[5, 5].tolist() == [255, 0, 0]


def test_one_pixel_wide_image() -> None:
    assert _decode(encode(np.full((9, 1, 3), 200, np.uint8))).shape == (9, 1, 3)


def _bomb(size_px: int) -> bytes:
    """A small file that would decode to size_px x size_px pixels."""
    buffer = io.BytesIO()
    Image.new("1", (size_px, size_px)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 200_000
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "0 bytes"),
        (b"this is a text file named .jpg\n" * 30, "not an image"),
        (_bomb(30_000), "30000 x 30000 px is more than data.max_image_pixels"),
        (_bomb(5_000), "5000 x 5000 px is more than data.max_image_pixels"),
        (b"\xff\xd8\xff\xe0", "not an image|cannot be decoded"),
    ],
)
def test_what_is_no_image_says_so(image: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode_rgb(image, max_pixels=LIMIT)


def test_truncated_jpeg_and_png_are_unreadable(generator: np.random.Generator) -> None:
    for kind in ("JPEG", "PNG"):
        image = encode(photograph_like(generator, 80, 80), kind)
        with pytest.raises(UnreadableImageError, match="cannot be decoded"):
            decode_rgb(image[: len(image) // 2], max_pixels=LIMIT)


def test_jpeg_with_harmless_bytes_behind_it_is_read(generator: np.random.Generator) -> None:
    image = encode(photograph_like(generator, 30, 30), "JPEG")
    assert np.array_equal(_decode(image + b"trailing bytes of a camera"), _decode(image))


def test_heic_is_read_by_its_package_within_the_limits(generator: np.random.Generator) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = encode(photograph_like(generator, 64, 96), "HEIF", quality=90)
    assert np.array_equal(_decode(image), np.array(Image.open(io.BytesIO(image)).convert("RGB")))
    with pytest.raises(UnreadableImageError, match="96 x 64 px is more than data.max_image_pixels=6000"):
        read_size(image, max_pixels=6_000)
    size = image.index(b"ispe") + 8
    decoy = image[:size] + (16).to_bytes(4, "big") * 2 + image[size + 8 :]  # a frame larger than the header says
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        decode_rgb(decoy, max_pixels=LIMIT)
    with pytest.raises(UnreadableImageError, match="a HEIC that is damaged|cannot be decoded"):
        decode_rgb(image[: len(image) // 2], max_pixels=LIMIT)
    buffer = io.BytesIO()
    pixels = (photograph_like(generator, 64, 96).astype("<u2") * 256).tobytes()
    pillow_heif.encode("RGB;16", (96, 64), pixels, buffer)
    with pytest.raises(UnreadableImageError, match="its 10-bit unsigned integers cannot be decoded.*save it as a"):
        decode_rgb(buffer.getvalue(), max_pixels=LIMIT, intensity_range=(0.0, 1023.0))
