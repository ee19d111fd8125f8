"""Refuse small files that would take minutes or gigabytes to decode, before a library reads them.

`data.max_image_pixels` bounds the cost of ordinary images. These checks cover the other ways to be slow, found format by
format with Pillow 13 and libjpeg-turbo, which limit none of them. A slow decoder does not crash, so isolation does not find
it. A limit on time would make refusals, and so the bits of a run, depend on the machine. Called by `decode.py`.

AVIF and HEIC need no checks here. The frame in an AVIF may be larger than its header says, but libavif decodes at most
16,384 x 16,384 px. libheif refuses such files.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from PIL import Image, TiffImagePlugin

from hvp_ray.errors import UnreadableImageError

MAX_SCANS = 100
MAX_SCANNED_PIXELS_FACTOR = 16
"""Scans x pixels of a JPEG are at most this x data.max_image_pixels. Encoders write about 10 scans."""

_SMALL_JPEG_BYTES = 8_192
_FEW_SCANS = 16
_MAX_JPEG_SEGMENTS = 2_000
_MAX_JPEG_GAP_BYTES = 65_536
_MAX_SEGMENTS_OF_SCANS = 20_000
_MAX_EXIF_SEGMENTS = 16
_MAX_EXIF_ENTRIES = 4_096
_MAX_PNG_CHUNKS = 20_000
_MAX_GIF_BLOCKS = 20_000
_MAX_PPM_HEADER_BYTES = 4_096
_MAX_PPM_COMMENTS = 1_000
_MAX_SLOW_BMP_PIXELS = 4_000_000
_MAX_SLOW_BMP_BYTES = 4 * 2**20
_MAX_TILE_PIXELS = 2**22
_MAX_JPEG2000_PARTS = 500_000
_MAX_JPEG2000_SEGMENTS = 10_000

_EOI, _SOS = 0xD9, 0xDA
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_JPEG_LS_FRAME = 0xF7
_SEQUENTIAL_FRAMES = frozenset({0xC0, 0xC1})
_NEXT_SEGMENT = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
"""Marker of a segment with a length. Bytes before it are fill bytes, pixels or markers without a length."""
_LATE_METADATA = frozenset({b"eXIf", b"iTXt", b"tEXt", b"zTXt"})
_JPEG2000_SIZE = re.compile(rb"\xff\x4f\xff\x51(?=.{20})", re.DOTALL)
_CODING_STYLE = re.compile(rb"\xff[\x52\x53]\x00[\x09-\x2f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class JpegHeader:
    """Facts about a JPEG from the segments before its first scan."""

    first_scan: int
    """Offset of the first scan's marker, in bytes."""
    exif: int | None
    """Offset of the first EXIF block, in bytes; None: there is no EXIF."""
    has_few_scans: bool
    """Whether decoders read one scan only (sequential, all components in it), or the file has few scans."""


def read_jpeg_header(image: bytes) -> JpegHeader | None:
    """Read the segments before the first scan; None: the header is incomplete.

    Raises:
        UnreadableImageError: far more metadata than cameras write.
    """
    if len(image) < _SMALL_JPEG_BYTES and b"Exif\x00\x00" not in image and image.count(b"\xff\xda") <= _FEW_SCANS:
        return JpegHeader(first_scan=2, exif=None, has_few_scans=True)  # fast path for thumbnails
    end, gap_bytes, num_exif, num_components = 2, 0, 0, -1
    exif: int | None = None
    is_sequential = False
    for number, (marker, start, content) in enumerate(_segments(image, end), 1):
        gap_bytes += start - end
        _check_gap(gap_bytes)
        if marker == _EOI or content + 2 >= len(image):
            return None
        if marker == _SOS:
            has_one_scan = is_sequential and num_components == image[content + 2]
            return JpegHeader(first_scan=start, exif=exif, has_few_scans=has_one_scan)
        if marker in _FRAMES and content + 7 < len(image):
            is_sequential, num_components = marker in _SEQUENTIAL_FRAMES, image[content + 7]
        if marker == 0xE1 and image[content + 2 : content + 8] == b"Exif\x00\x00":
            exif = content + 8 if exif is None else exif
            num_exif += 1
        if number > _MAX_JPEG_SEGMENTS or num_exif > _MAX_EXIF_SEGMENTS:
            raise UnreadableImageError(
                f"a JPEG with more than {_MAX_JPEG_SEGMENTS} segments, or {_MAX_EXIF_SEGMENTS} of EXIF, before its pixels"
            )
        end = content + _length(image, content)
    _check_gap(gap_bytes + len(image) - end)
    return None


def _segments(image: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """Yield the marker of each segment from `position` on, and the offsets of the marker and of the content."""
    while found := _NEXT_SEGMENT.search(image, position):
        yield found[1][0], found.start(), found.end()
        position = found.end() + _length(image, found.end())


def _length(image: bytes, content: int) -> int:
    return max(2, int.from_bytes(image[content : content + 2], "big"))


def _check_gap(num_bytes: int) -> None:
    if num_bytes > _MAX_JPEG_GAP_BYTES:
        raise UnreadableImageError(f"a JPEG with more than {_MAX_JPEG_GAP_BYTES} bytes between its segments")


def check_scans(image: bytes, header: JpegHeader, *, num_pixels: int, max_pixels: int) -> None:
    """Refuse a JPEG of many scans. A scan of a few bytes makes the decoder visit all pixels.

    Raises:
        UnreadableImageError: more than 100 scans, or scans x pixels are more than 16 x `max_pixels`.
    """
    if header.has_few_scans:
        return
    limit = min(MAX_SCANS, MAX_SCANNED_PIXELS_FACTOR * max_pixels // max(1, num_pixels))
    # Data after the image (a second image, a film) may contain the marker's two bytes by chance.
    if image.count(b"\xff\xda", header.first_scan) <= limit:
        return
    num_scans = 0
    for number, (marker, _, _) in enumerate(_segments(image, header.first_scan)):
        num_scans += marker == _SOS
        if num_scans > limit or number > _MAX_SEGMENTS_OF_SCANS:
            break
        if marker == _EOI:
            return
    else:
        return
    raise UnreadableImageError(
        f"a JPEG of more than {limit} scans: at most {MAX_SCANS}, and {MAX_SCANNED_PIXELS_FACTOR} x data.max_image_pixels "
        f"in all scans together"
    )


def jpeg_frame(image: bytes) -> tuple[int, int] | None:
    """Return the frame's marker and bits per channel; None: the first segments have no complete frame."""
    for marker, _, content in islice(_segments(image, 2), _MAX_JPEG_SEGMENTS):
        if content + 3 > len(image) or marker in (_SOS, _EOI):
            return None
        if marker in _FRAMES or marker == _JPEG_LS_FRAME:
            return marker, image[content + 2]
    return None


def has_too_many_entries(block: bytes) -> bool:
    """Tell whether an EXIF block or a TIFF has more than 4,096 entries. Reading an entry is slow."""
    if block.startswith(b"Exif\x00\x00"):
        block = block[6:]
    order = "<" if block[:2] == b"II" else ">"
    is_big = block[2:4] in (b"+\x00", b"\x00+")
    if len(block) < 16:
        return False
    (offset,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", block, 8 if is_big else 4)
    if offset + 8 > len(block):
        return False
    (num_entries,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}H", block, offset)
    return bool(num_entries > _MAX_EXIF_ENTRIES)


def check_bytes(image: bytes, *, max_pixels: int) -> None:
    """Check an image before a library opens it. Bytes of no known format pass.

    Raises:
        UnreadableImageError: the image would cost much more than its size suggests.
    """
    if image.startswith(b"\x89PNG"):
        _check_png(image, max_pixels)
    elif image.startswith(b"GIF8"):
        _check_gif(image)
    elif image.startswith(b"BM"):
        _check_bmp(image)
    elif image.startswith((b"II", b"MM")) and has_too_many_entries(image):
        raise UnreadableImageError(f"a TIFF of more than {_MAX_EXIF_ENTRIES} entries")
    elif image.startswith(b"P"):
        _check_ppm(image)
    elif image.startswith((b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP")):
        _check_jpeg2000(image)


def has_late_metadata(image: bytes) -> bool:
    """Tell whether a PNG has metadata after its pixels. Reading it requires decoding."""
    kinds = [kind for kind, _ in _png_chunks(image)]
    return b"IDAT" in kinds and not _LATE_METADATA.isdisjoint(kinds[kinds.index(b"IDAT") :])


def check_opened(opened: Image.Image, image: bytes) -> None:
    """Check an image that Pillow has opened and not decoded.

    Refuses TIFF tiles far larger than the image (libtiff decodes whole tiles), and JPEG strips of many scans.

    Raises:
        UnreadableImageError: the image would cost much more than its size suggests.
    """
    if not isinstance(opened, TiffImagePlugin.TiffImageFile):
        return
    tags = opened.tag_v2
    check_tiff_tiles((opened.height, opened.width), (_number(tags.get(323)), _number(tags.get(322))))
    offsets = tags.get(324) or tags.get(273) or ()
    num_parts = len(offsets) if isinstance(offsets, tuple) else 1
    if _number(tags.get(259)) in (6, 7) and image.count(b"\xff\xda") > 16 * (num_parts + 1):
        raise UnreadableImageError(f"a TIFF of {num_parts} JPEG parts with more than 16 scans each")


def check_tiff_tiles(size: tuple[int, int], tile: tuple[int, int]) -> None:
    """Check heights and widths in px of a TIFF and of its tiles; (0, 0): it has none.

    Raises:
        UnreadableImageError: the tiles are far larger than the image.
    """
    if tile[0] * tile[1] > max(_MAX_TILE_PIXELS, 4 * size[0] * size[1]):
        raise UnreadableImageError(f"a TIFF of {size[1]} x {size[0]} px in tiles of {tile[1]} x {tile[0]} px")


def _number(value: object) -> int:
    """Return a TIFF value as a number; 0: it is missing."""
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, int) else 0


def _png_chunks(image: bytes) -> list[tuple[bytes, int]]:
    """Return kind and length of the chunks up to IEND, at most `_MAX_PNG_CHUNKS` + 1 of them."""
    chunks: list[tuple[bytes, int]] = []
    position = 8
    while position + 8 <= len(image) and len(chunks) <= _MAX_PNG_CHUNKS:
        length, kind = struct.unpack_from(">I4s", image, position)
        chunks.append((kind, length))
        if kind == b"IEND":
            break
        position += 12 + length
    return chunks


def _check_png(image: bytes, max_pixels: int) -> None:
    if len(_png_chunks(image)) > _MAX_PNG_CHUNKS:
        raise UnreadableImageError(f"a PNG of more than {_MAX_PNG_CHUNKS} chunks")
    if image[12:16] == b"IHDR" and len(image) >= 24:
        width, height = struct.unpack_from(">II", image, 16)
        if width * height > max_pixels:
            raise UnreadableImageError(f"{width} x {height} px is more than data.max_image_pixels={max_pixels}")


def _check_gif(image: bytes) -> None:
    """Refuse many parts of comments and other extensions before the first image; Pillow reads each in Python."""
    if len(image) < 13:
        return
    position = 13 + (3 << ((image[10] & 7) + 1) if image[10] & 0x80 else 0)
    num_blocks = 0

    def count() -> None:
        nonlocal num_blocks
        num_blocks += 1
        if num_blocks > _MAX_GIF_BLOCKS:
            raise UnreadableImageError(f"a GIF with more than {_MAX_GIF_BLOCKS} blocks before its first image")

    def skip_part() -> bool:
        nonlocal position
        count()
        length = image[position] if position < len(image) else 0
        position += 1 + length
        return length > 0

    while position < len(image) and image[position] not in b",;":
        position += 1
        count()
        if image[position - 1] == 0x21:
            label = image[position : position + 1]
            position += 1
            is_loop = image.startswith(b"NETSCAPE2.0", position + 1)
            has_part = skip_part()
            if label == b"\xfe":
                while has_part:
                    has_part = skip_part()
                continue
            if label == b"\xff" and is_loop:
                skip_part()
            while skip_part():
                pass


def _check_bmp(image: bytes) -> None:
    """Refuse large run-length encoded bitmaps. Pillow decodes them in Python, byte by byte."""
    if len(image) < 34 or struct.unpack_from("<I", image, 14)[0] < 40:
        return
    width, height = struct.unpack_from("<ii", image, 18)
    is_run_length_encoded = struct.unpack_from("<I", image, 30)[0] in (1, 2)
    is_large = abs(width * height) > _MAX_SLOW_BMP_PIXELS or len(image) > _MAX_SLOW_BMP_BYTES
    if is_run_length_encoded and is_large:
        raise UnreadableImageError(
            f"a run-length encoded BMP of {width} x {abs(height)} px in {len(image)} bytes; at most "
            f"{_MAX_SLOW_BMP_PIXELS} px and {_MAX_SLOW_BMP_BYTES} bytes are read"
        )


def _check_ppm(image: bytes) -> None:
    """Refuse long headers, and many comments in plain files. Pillow reads both very slowly."""
    if len(image) <= _MAX_PPM_HEADER_BYTES:
        return
    header = re.sub(rb"#[^\r\n]*[\r\n]?", b" ", image[:_MAX_PPM_HEADER_BYTES])
    num_fields = 3 if image[1:2] in b"14" else 4
    if len(header.split()) < num_fields:
        raise UnreadableImageError(f"a PPM with a header of more than {_MAX_PPM_HEADER_BYTES} bytes")
    if image[1:2] in b"123" and image.count(b"#") > _MAX_PPM_COMMENTS:
        raise UnreadableImageError(f"a PPM with more than {_MAX_PPM_COMMENTS} comments")


def _check_jpeg2000(image: bytes) -> None:
    """Refuse many precincts and code blocks. The decoder allocates some hundred bytes for each, even if it is empty."""
    # Check all of them: the first may be a decoy.
    starts = [size.end() for size in islice(_JPEG2000_SIZE.finditer(image), _MAX_JPEG2000_SEGMENTS)]
    styles = [style.start() + 2 for style in islice(_CODING_STYLE.finditer(image), _MAX_JPEG2000_SEGMENTS)]
    if max(len(starts), len(styles)) >= _MAX_JPEG2000_SEGMENTS:
        raise UnreadableImageError(f"a JPEG 2000 of more than {_MAX_JPEG2000_SEGMENTS} coding styles")
    sizes = [struct.unpack_from(">4I", image, start + 4) for start in starts]
    width = max((right - left for right, _, left, _ in sizes), default=0)
    height = max((bottom - top for _, bottom, _, top in sizes), default=0)
    for start in styles:
        segment = image[start : start + struct.unpack_from(">H", image, start)[0]]
        is_default = image[start - 1] == 0x52  # COD; otherwise COC, of one component
        # Levels, width and height of code blocks, style, transform, precincts from the lowest level up.
        style = segment[7 if is_default else 4 :]
        if len(style) < 5:
            continue
        has_precincts = segment[2 if is_default else 3] & 1
        levels = style[0]
        num_precincts = 0
        for level, size in enumerate(style[5 : 6 + levels] if has_precincts else b""):
            shift = max(0, levels - level)
            num_precincts += -(-width >> shift + (size & 15)) * -(-height >> shift + (size >> 4))
        num_code_blocks = width * height >> (style[1] & 15) + (style[2] & 15) + 4
        if num_precincts > _MAX_JPEG2000_PARTS or num_code_blocks > _MAX_JPEG2000_PARTS:
            raise UnreadableImageError(
                f"a JPEG 2000 of {num_precincts} precincts and {num_code_blocks} code blocks; at most {_MAX_JPEG2000_PARTS} "
                f"are read"
            )
