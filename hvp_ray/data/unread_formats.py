"""Describe bytes that no decoder reads as an image, and name the remedy.

The sentence is the reason in the list of unreadable images.
"""

import io
import struct
from importlib.util import find_spec

from PIL import TiffImagePlugin, features

from hvp_ray.data.image_limits import jpeg_frame
from hvp_ray.data.intensity import KINDS_OF_NUMBERS

_CONVERT = "convert it to JPEG or PNG"
_STARTS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\x0a", f"a JPEG XL image, which is not read; {_CONVERT}"),
    (0, b"\x00\x00\x00\x0cJXL ", f"a JPEG XL image, which is not read; {_CONVERT}"),
    (0, b"8BPS", f"a Photoshop document, which is not read; {_CONVERT}"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image, which is not read; convert it to a TIFF or PNG of 16 bits"),
    (0, b"#?R", "a Radiance HDR image, which is not read; convert it to a TIFF or PNG of 16 bits"),
    (0, b"PF\n", "a portable float map of three channels, which is not read; convert it to a TIFF or PNG of 16 bits"),
    (0, b"P7\n", f"a portable arbitrary map (PAM), which is not read; {_CONVERT}"),
    (128, b"DICM", "a DICOM file, which is not read; convert it to a TIFF or PNG of 16 bits"),
    (0, b"SIMPLE  =", "a FITS file, which is not read; convert it to a TIFF of 16 bits"),
    (0, b"\x89HDF", "an HDF5 file, which is not read; convert its images to TIFF or PNG"),
    (0, b"\x00\x00\x01\x00", f"an icon (ICO), which is not read; {_CONVERT}"),
    (0, b"%PDF", f"a PDF document, which is not read; {_CONVERT}"),
    (0, b"PK\x03\x04", "a zip archive, not an image; unpack it"),
    (0, b"\x1f\x8b", "a gzip file, not an image; unpack it"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not an image; fetch the images with git lfs pull"),
)
_DAMAGED = "not an image that can be decoded: {} that is damaged, or larger than its decoder allows"
_BRANDS = (
    (b"avif", b"avis"),
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    (b"crx ",),
)
_OPTIONAL = (
    ("a WebP", "webp", 8, b"WEBP"),
    ("a JPEG 2000", "jpg_2000", 0, (b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")),
)
"""Formats that Pillow may lack: name, feature of Pillow, bytes at an offset."""
_FRAMES = {0xF7: "a JPEG-LS", 0xC3: "a lossless JPEG", 0xC7: "a lossless JPEG", 0xCB: "a lossless JPEG"}
_JPEG_START = b"\xff\xd8\xff"
_SEARCHED_BYTES = 256


def describe_unread(image: bytes) -> str:
    """Return why no decoder reads these bytes: their format, or that they have none."""
    for place, start, what in _STARTS:
        if image.startswith(start, place):
            return what
    if image[4:8] == b"ftyp":
        return _describe_boxes(image)
    if image.startswith(_JPEG_START):
        return unread_jpeg(image) or "not an image that can be decoded: a JPEG with a damaged header"
    if image.startswith((b"II", b"MM")):
        return _describe_tiff(image)
    for name, feature, offset, starts in _OPTIONAL:
        if image.startswith(starts, offset):
            missing = not features.check(feature)
            return f"{name} image; {_without(name[2:])}" if missing else _DAMAGED.format(name)
    text = image[:_SEARCHED_BYTES].lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an image: the download failed; fetch it again"
    if text.startswith((b"<?xml", b"<svg")):
        return f"an SVG or XML file, which is not read; {_CONVERT}"
    return "not an image: the bytes have no known format"


def _without(name: str) -> str:
    """Return the remedy for a Pillow that was built without a format."""
    return f"this Pillow was built without {name}: pip install --upgrade pillow, or {_CONVERT}"


def _describe_boxes(image: bytes) -> str:
    """Describe an ISO base media file by its brands; AVIF also has the brand of HEIC's container."""
    brands = image[8 : min(_SEARCHED_BYTES, struct.unpack_from(">I", image)[0])]
    is_avif, is_heic, is_raw = (any(brand in brands for brand in of_format) for of_format in _BRANDS)
    if is_avif:
        return _DAMAGED.format("an AVIF") if features.check("avif") else f"an AVIF image; {_without('AVIF')}"
    if is_heic and find_spec("pillow_heif") is None:
        return "a HEIC image, which needs the package pillow-heif: pip install 'hvp-ray[heic]'"
    if is_heic:
        return _DAMAGED.format("a HEIC")
    if is_raw:
        return f"a Canon raw image, which is not read; {_CONVERT}"
    return "a film (MP4 or QuickTime), not an image; extract its frames"


def unread_jpeg(image: bytes) -> str | None:
    """Return why a JPEG is not read; None: it is no JPEG, or one that is read."""
    frame = jpeg_frame(image) if image.startswith(_JPEG_START) else None
    if frame is None:
        return None
    marker, bits = frame
    if marker in _FRAMES:
        return f"{_FRAMES[marker]}, which is not read; convert it to PNG"
    if bits != 8:
        return f"a JPEG of {bits} bits a channel, which is not read; convert it to a PNG or TIFF of 16 bits"
    return None


def _describe_tiff(image: bytes) -> str:
    """Describe a TIFF by its tags. The caller has checked their number."""
    try:
        file = io.BytesIO(image)
        head = file.read(16 if image[2:4] in (b"+\x00", b"\x00+") else 8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        bands = int(tags.get(277, 1))
        bits = tags.get(258, (1,))[0]
        number = tags.get(339, (1,))[0]
        compression = TiffImagePlugin.COMPRESSION_INFO.get(tags.get(259, 1))
    except Exception:  # noqa: BLE001 (Pillow's parser raises many types: the tags are damaged)
        return "not an image that can be decoded: a TIFF with damaged tags"
    kind = KINDS_OF_NUMBERS.get(number, "numbers")
    what = f"a TIFF of {bands} band{'s' * (bands != 1)} of {bits}-bit {kind}"
    if compression is None:
        return f"{what}, compressed in a way that is not read; save it with deflate or LZW"
    if bands != 1:
        return (
            f"{what}, which is not read as RGB; set data.channels={bands}, or save the three bands that you want as RGB"
        )
    return f"{what}, which is not read; save it as a TIFF or PNG of 16-bit unsigned integers"
