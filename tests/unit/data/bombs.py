"""Build hostile files byte by byte: small ones that would take minutes or gigabytes, or crash a library."""

import functools
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.helpers import encode

# Images.


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@functools.lru_cache
def zeros(num_bytes: int) -> bytes:
    """Return compressed zeros, a thousandth of their size."""
    packer, block = zlib.compressobj(1), bytes(2**20)
    return b"".join(packer.compress(block) for _ in range(num_bytes >> 20)) + packer.flush()


def png(
    width: int,
    height: int,
    *,
    color: int = 2,
    depth: int = 8,
    before: bytes = b"",
    after: bytes = b"",
    pixels: bytes | None = None,
) -> bytes:
    row_bytes = 1 + (width * {0: 1, 2: 3}[color] * depth + 7) // 8
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    content = zlib.compress(bytes(row_bytes * height)) if pixels is None else pixels
    body = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", content) + after + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg(width: int, height: int, *, front: bytes = b"") -> bytes:
    """Return a JPEG of 16 x 16 px whose header claims another size."""
    image = bytearray(encode(np.zeros((16, 16, 3), np.uint8), "JPEG"))
    frame = image.index(b"\xff\xc0")
    image[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(image[:2]) + front + bytes(image[2:])


def cmyk_jpeg(*, front: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()[:2] + front + buffer.getvalue()[2:]


def jpeg_of_scans(width: int, height: int, num_scans: int, *, between: bytes = b"") -> bytes:
    """Return a progressive JPEG. Each scan of a few bytes adds nothing, but makes the decoder visit all blocks."""
    num_blocks = -(-width // 8) * -(-height // 8)
    tables = _segment(0xDB, b"\x00" + b"\x01" * 64)
    tables += _segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00") + _segment(
        0xC4, b"\x10\x01\x01" + bytes(14) + b"\xe0\x00"
    )
    frame = _segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00")
    bits = ("0" + "1" * 14) * -(-num_blocks // 32_767)  # a run of 32,767 ended bands
    bits += "1" * (-len(bits) % 8)
    nothing = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    scans = [_segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + bytes(-(-num_blocks // 8))]
    for number in range(num_scans - 1):
        band = 1 + number % 63
        scans.append(between + _segment(0xDA, bytes([1, 1, 0, band, band, 0])) + nothing)
    return b"\xff\xd8" + tables + frame + b"".join(scans) + b"\xff\xd9"


def exif_of_entries(num_entries: int) -> bytes:
    entries = b"".join(struct.pack("<HHII", 0x200 + i, 1, 1, 0) for i in range(num_entries))
    return b"II*\x00" + struct.pack("<IH", 8, num_entries) + entries + bytes(4)


def jpeg_exif_of_entries(num_entries: int) -> bytes:
    return _segment(0xE1, b"Exif\x00\x00" + exif_of_entries(num_entries))


def gif(width: int, height: int, *, extensions: bytes = b"", num_frames: int = 1) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\x00\x00\x00\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return screen + extensions + frame * num_frames + b";"


def bmp(width: int, height: int, *, runs: bytes | None = None) -> bytes:
    bits, compression = (24, 0) if runs is None else (8, 1)
    palette, content = (b"", b"") if runs is None else (bytes(1024), runs)
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(content), 0, 0, len(palette) // 4, 0
    )
    start = 54 + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(content), 0, 0, start) + header + palette + content


def tiff(tags: dict[int, list[int]], content: bytes) -> bytes:
    """Return a TIFF. Tags are 32-bit numbers; the content begins at byte 8."""
    start = 8 + len(content)
    entries, values = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        place = packed
        if len(numbers) > 1:
            place = struct.pack("<I", start + 2 + 12 * len(tags) + 4 + len(values))
            values += packed
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + place
    directory = struct.pack("<H", len(tags)) + entries + bytes(4) + values
    return b"II*\x00" + struct.pack("<I", start) + content + directory


def tiff_with_tile(size_px: int, tile_px: int) -> bytes:
    content = zlib.compress(bytes(tile_px * tile_px))
    size = {256: [size_px], 257: [size_px], 322: [tile_px], 323: [tile_px]}
    return tiff(size | {258: [8], 259: [8], 262: [1], 277: [1], 324: [8], 325: [len(content)]}, content)


def webp(width: int, height: int, *, num_frames: int) -> bytes:
    """Return an animation of single pixels on a large canvas."""
    pixel = encode(np.zeros((1, 1, 3), np.uint8), "WEBP", lossless=True)[12:]
    frame = bytes(12) + b"\x0a\x00\x00\x00" + pixel
    canvas = b"\x02\x00\x00\x00" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    body += (b"ANMF" + struct.pack("<I", len(frame)) + frame) * num_frames
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def apng(num_frames: int) -> bytes:
    def control(number: int) -> bytes:
        return png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 4, 4, 0, 0, 1, 1, 0, 0))

    def frame(number: int) -> bytes:
        content = png_chunk(b"fdAT", struct.pack(">I", number + 1) + zlib.compress(bytes(52)))
        return control(number) + content

    frames = b"".join(frame(2 * index + 1) for index in range(num_frames))
    return png(4, 4, before=png_chunk(b"acTL", struct.pack(">II", num_frames, 0)) + control(0), after=frames)


def jpeg2000(size_px: int, *, precinct: int, code_block: int = 4) -> bytes:
    """Return an empty image with precincts of 2**precinct px and code blocks of 2**(code_block + 2) px."""
    size = struct.pack(">HIIIIIIIIH", 0, size_px, size_px, 0, 0, size_px, size_px, 0, 0, 1) + b"\x07\x01\x01"
    style = bytes([1, 0, 0, 1, 0, 0, code_block, code_block, 0, 1, precinct * 17])
    head = b"\xff\x4f" + _segment(0x51, size) + _segment(0x52, style) + _segment(0x5C, b"\x40\x40")
    return head + b"\xff\x90" + struct.pack(">HHIBB", 10, 0, 114, 0, 1) + b"\xff\x93" + bytes(100) + b"\xff\xd9"


def avif_of_size(size_px: int) -> bytes:
    """Return an AVIF of 8 x 8 px whose header claims another size."""
    image = encode(np.zeros((8, 8, 3), np.uint8), "AVIF")
    start = image.index(b"ispe") + 8
    return image[:start] + struct.pack(">II", size_px, size_px) + image[start + 8 :]


_PROFILE = b"\nexif\n%8d\n" % 400_000 + exif_of_entries(30_000).hex().encode()

IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG of 50,000 x 50,000 px": (
        lambda: png(50_000, 50_000, color=0, depth=1, pixels=zeros(6_251 * 50_000)),
        "more than data.max_image_pixels",
    ),
    "PNG a little too large": (lambda: png(10_100, 10_100, pixels=zeros(2**28)), "more than data.max_image_pixels"),
    "PNG with a large iCCP": (
        lambda: png(4, 4, before=png_chunk(b"iCCP", b"x\x00\x00" + zeros(2**26))),
        "too large|cannot be decoded",
    ),
    "PNG with a large zTXt": (
        lambda: png(4, 4, before=png_chunk(b"zTXt", b"x\x00\x00" + zeros(2**26))),
        "too large|cannot be decoded",
    ),
    "PNG with a large iTXt behind its pixels": (
        lambda: png(4, 4, after=png_chunk(b"iTXt", b"x\x00\x01\x00\x00\x00" + zeros(2**26))),
        "too large|cannot be decoded",
    ),
    "PNG of many text chunks": (
        lambda: png(4, 4, before=png_chunk(b"zTXt", b"x\x00\x00" + zlib.compress(bytes(10**6))) * 70),
        "text chunks",
    ),
    "PNG of a million chunks": (lambda: png(4, 4, before=png_chunk(b"teSt", b"") * 10**6), "20000 chunks"),
    "PNG of a million empty IDAT": (lambda: png(4, 4, after=png_chunk(b"IDAT", b"") * 10**6), "20000 chunks"),
    "PNG without pixels": (lambda: png(0, 0), "not an image"),
    "APNG of 100,000 frames": (lambda: apng(100_000), "20000 chunks"),
    "JPEG whose header says 65500 x 65500": (lambda: jpeg(65_500, 65_500), "more than data.max_image_pixels"),
    "JPEG without pixels": (lambda: jpeg(0, 0), "not an image"),
    "JPEG of 5,000 scans": (lambda: jpeg_of_scans(2_000, 2_000, 5_000), "more than 100 scans"),
    "large JPEG of 50 scans": (lambda: jpeg_of_scans(9_900, 9_900, 50), "more than 16 scans"),
    "JPEG of scans and a million tables": (
        lambda: jpeg_of_scans(200, 200, 150, between=b"\xff\xc4\x00\x02" * 10_000),
        "scans",
    ),
    "JPEG of scans and runs of fill bytes": (
        lambda: jpeg_of_scans(200, 200, 150, between=b"\xff" * 20_000 + b"\x00"),
        "scans",
    ),
    "JPEG of pairs of zero": (lambda: b"\xff\xd8\xff\xe0\x00\x02" + b"\xff\x00" * 10**7, "between its segments"),
    "JPEG of a million EXIF segments": (
        lambda: jpeg(16, 16, front=_segment(0xE1, b"Exif\x00\x00x") * 10**6),
        "16 of EXIF",
    ),
    "JPEG of a million segments": (lambda: jpeg(16, 16, front=_segment(0xE5, b"") * 10**6), "2000 segments"),
    "JPEG with megabytes between segments": (lambda: jpeg(16, 16, front=b"\xff" * 10**7), "between its segments"),
    "GIF of 65,535 x 65,535 px": (lambda: gif(65_535, 65_535), "more than data.max_image_pixels"),
    "GIF with a long comment": (
        lambda: gif(10, 10, extensions=b"!\xfe" + b"\x01x" * 5 * 10**6 + b"\x00"),
        "20000 blocks",
    ),
    "GIF of a million extensions": (lambda: gif(10, 10, extensions=b"!\xfe\x01x\x00" * 10**6), "20000 blocks"),
    "BMP of 60,000 x 60,000 px": (lambda: bmp(60_000, 60_000), "more than data.max_image_pixels"),
    "BMP in one long row": (lambda: bmp(99_000_000, 1, runs=b"\x01\x01\x00\x00"), "run-length encoded"),
    "BMP of empty runs": (lambda: bmp(100, 100, runs=b"\xff\x01" * 4 * 10**6), "run-length encoded"),
    "TIFF of 60,000 x 60,000 px": (
        lambda: tiff({256: [60_000], 257: [60_000], 258: [8], 259: [1], 262: [1], 273: [8], 279: [100]}, bytes(100)),
        "more than data.max_image_pixels",
    ),
    "TIFF with a large tile": (lambda: tiff_with_tile(16, 16_000), "tiles of 16000 x 16000"),
    "TIFF of many entries": (lambda: exif_of_entries(60_000), "4096 entries"),
    "TIFF of JPEG with many scans": (
        lambda: tiff(
            {256: [99], 257: [99], 258: [8], 259: [7], 262: [1], 273: [8], 279: [9_000]}, jpeg_of_scans(99, 99, 500)
        ),
        "16 scans each",
    ),
    "WebP on a canvas of 13,000 x 13,000 px": (
        lambda: webp(13_000, 13_000, num_frames=2),
        "more than data.max_image_pixels",
    ),
    "AVIF whose header says 15,000 x 15,000 px": (lambda: avif_of_size(15_000), "more than data.max_image_pixels"),
    "AVIF whose header says 60,000 x 60,000 px": (lambda: avif_of_size(60_000), "larger than its decoder allows"),
    "PPM of 60,000 x 60,000 px": (lambda: b"P6 60000 60000 255\n" + bytes(100), "more than data.max_image_pixels"),
    "PPM with a long comment": (lambda: b"P6 #" + b"a" * 10**7 + b"\n2 2 255\n" + bytes(12), "header of more than"),
    "PPM of comments": (lambda: b"P3 10 10 255\n" + b"#a\n" * 3 * 10**6, "comments"),
    "TIFF of 16 bits with a large tile": (
        lambda: tiff(
            {256: [16], 257: [16], 258: [16] * 3, 259: [8], 262: [2], 277: [3]}
            | {322: [16_000], 323: [16_000], 324: [8], 325: [99]},
            bytes(99),
        ),
        "tiles of 16000 x 16000",
    ),
    "JPEG 2000 of single-pixel precincts": (lambda: jpeg2000(9_900, precinct=0), "precincts"),
    "JPEG 2000 of tiny code blocks": (lambda: jpeg2000(9_900, precinct=15, code_block=0), "code blocks"),
}
"""Name -> function that builds the file, and the expected message."""

HARMLESS: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "WebP of 100,000 frames": (lambda: webp(16, 16, num_frames=100_000), (16, 16)),
    "PNG with far more content than pixels": (lambda: png(10, 10, pixels=zeros(2**26)), (10, 10)),
    "JPEG of 12 scans": (lambda: jpeg_of_scans(64, 48, 12), (48, 64)),
    "PNG with EXIF of many entries": (lambda: png(4, 4, before=png_chunk(b"eXIf", exif_of_entries(60_000))), (4, 4)),
    "PNG with EXIF of many entries behind its pixels": (
        lambda: png(4, 4, after=png_chunk(b"eXIf", exif_of_entries(60_000))),
        (4, 4),
    ),
    "PNG with EXIF in text": (
        lambda: png(4, 4, before=png_chunk(b"zTXt", b"Raw profile type exif\x00\x00" + zlib.compress(_PROFILE))),
        (4, 4),
    ),
    "JPEG with EXIF of many entries": (lambda: jpeg(16, 16, front=jpeg_exif_of_entries(5_400)), (16, 16)),
    "CMYK JPEG with EXIF of many entries": (lambda: cmyk_jpeg(front=jpeg_exif_of_entries(5_400)), (16, 16)),
    "WebP with EXIF of many entries": (
        lambda: encode(np.zeros((4, 4, 3), np.uint8), "WEBP", exif=exif_of_entries(60_000)),
        (4, 4),
    ),
    "AVIF with EXIF of many entries": (
        lambda: encode(np.zeros((4, 4, 3), np.uint8), "AVIF", exif=exif_of_entries(60_000)),
        (4, 4),
    ),
}
"""Name -> function that builds the file, and its height and width: images that look hostile but are readable."""


# Parquet.

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images_table(images: list[bytes], *, paths: list[str] | None = None) -> pa.Table:
    rows = pa.StructArray.from_arrays(
        [pa.array(images, pa.binary()), pa.array(paths or ["x"] * len(images))], names=["bytes", "path"]
    )
    return pa.table({"image": rows, "label": pa.array(np.arange(len(images)))})


def write_parquet(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, compression="zstd", **({"use_dictionary": False} | options))
    return path


def write_dictionary_bomb(path: Path, *, value_bytes: int, num_rows: int) -> Path:
    """Write one large value, and rows that refer to it."""
    image = pa.array([os.urandom(value_bytes)], pa.binary())
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_rows, np.int32)), image)
    table = pa.table({"image": rows, "label": pa.array(np.zeros(num_rows, np.int64))})
    return write_parquet(path, table, use_dictionary=True, dictionary_pagesize_limit=2**30, store_schema=False)


def write_labels_bomb(path: Path, num_rows: int) -> Path:
    """Write null images with labels of zero, all as run lengths."""
    part = 1_000_000
    table = pa.table({"image": pa.nulls(part, pa.binary()), "label": pa.repeat(pa.scalar(0, pa.int64()), part)})
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(num_rows // part):
            writer.write_table(table)
    return path


def write_page_bomb(path: Path, *, page_bytes: int, num_pages: int) -> Path:
    """Write one page of zeros many times, in a column that claims 1,000 bytes."""
    footer = Footer(write_parquet(path, pa.table({"image": pa.array([bytes(page_bytes)])}), write_statistics=False))
    chunk = footer.chunk(0)
    start = field(chunk, CHUNK_START)[2]
    footer.data = footer.data[:start] + footer.data[start : start + field(chunk, CHUNK_COMPRESSED)[2]] * num_pages
    field(chunk, CHUNK_COMPRESSED)[2] *= num_pages
    field(chunk, CHUNK_DECOMPRESSED)[2] = 1_000
    for entry in (field(chunk, CHUNK_VALUES), field(footer.row_group(), GROUP_ROWS), field(footer.fields, FILE_ROWS)):
        entry[2] = num_pages
    return footer.write()


Fields = list[list[Any]]
"""A Thrift struct as [id, type, value] of each field; of a list, value is [type, elements]."""


class Footer:
    """The footer of a Parquet file, to modify and write back."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self._path, size = path, int.from_bytes(content[-8:-4], "little")
        self.data = content[: -8 - size]
        self.fields = ThriftIn(content[-8 - size : -8]).struct()

    def row_group(self, index: int = 0) -> Fields:
        group: Fields = field(self.fields, 4)[2][1][index]
        return group

    def chunk(self, column: int, group: int = 0) -> Fields:
        metadata: Fields = field(field(self.row_group(group), 1)[2][1][column], 3)[2]
        return metadata

    def write(self) -> Path:
        write_footer(self._path, thrift_struct(self.fields), data=self.data)
        return self._path


CHUNK_VALUES, CHUNK_DECOMPRESSED, CHUNK_COMPRESSED, CHUNK_START, CHUNK_STATISTICS_OF_SIZE = 5, 6, 7, 9, 16
GROUP_ROWS, FILE_ROWS = 3, 3


def write_footer(path: Path, footer: bytes, *, data: bytes = b"PAR1") -> Path:
    path.write_bytes(data + footer + struct.pack("<I", len(footer)) + b"PAR1")
    return path


def field(fields: Fields, number: int) -> list[Any]:
    return next(found for found in fields if found[0] == number)


def footer_of_chunks(num_chunks: int) -> bytes:
    """Return a footer whose only row group claims `num_chunks` columns, in three bytes each."""
    schema = [[[4, 8, b"r"], [5, 5, 1]], [[1, 5, 6], [3, 5, 1], [4, 8, b"image"]]]
    head = thrift_struct([[1, 5, 2], [2, 9, [12, schema]], [3, 6, 1]])[:-1]
    group = b"\x19\xfc" + _varint(num_chunks) + b"\x26\x00\x00" * num_chunks + thrift_struct([[1, 6, 10], [2, 6, 1]])
    return head + b"\x19\x1c" + group + b"\x00"


class ThriftIn:
    """Reads Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data, self.position = data, 0

    def struct(self) -> Fields:
        fields: Fields = []
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            fields.append([number, head & 15, self._value(head & 15)])
        return fields

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2:
                return None
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._zigzag()
            case 7:
                return self._take(8)
            case 8:
                return self._take(self._varint())
            case 9:
                head = self._byte()
                size = head >> 4 if head >> 4 < 15 else self._varint()
                element = 3 if head & 15 in (1, 2) else head & 15
                return [head & 15, [self._value(element) for _ in range(size)]]
            case 12:
                return self.struct()
        raise AssertionError(kind)

    def _take(self, count: int) -> bytes:
        self.position += count
        return self._data[self.position - count : self.position]

    def _byte(self) -> int:
        return self._take(1)[0]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


def thrift_struct(fields: Fields) -> bytes:
    content, last = b"", 0
    for number, kind, value in fields:
        content += bytes([(number - last) << 4 | kind]) + _thrift_value(kind, value)
        last = number
    return content + b"\x00"


def _thrift_value(kind: int, value: Any) -> bytes:
    match kind:
        case 1 | 2:
            return b""
        case 3:
            return bytes([value])
        case 4 | 5 | 6:
            return _varint((value << 1) ^ (value >> 63))
        case 7:
            return bytes(value)
        case 8:
            return _varint(len(value)) + value
        case 9:
            element, values = value
            head = (
                bytes([len(values) << 4 | element])
                if len(values) < 15
                else bytes([0xF0 | element]) + _varint(len(values))
            )
            return head + b"".join(_thrift_value(3 if element in (1, 2) else element, item) for item in values)
    return thrift_struct(value)


def _varint(value: int) -> bytes:
    content = b""
    while value > 127:
        content += bytes([value & 127 | 128])
        value >>= 7
    return content + bytes([value])


def sparse(path: Path, num_bytes: int, *, end: bytes = b"") -> Path:
    """Write a file with a large size that takes no space on the disk."""
    with path.open("wb") as file:
        file.truncate(num_bytes - len(end))
        file.seek(num_bytes - len(end))
        file.write(end)
    return path


def picture() -> bytes:
    """Return a readable image."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()
