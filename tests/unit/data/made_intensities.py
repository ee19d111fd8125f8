"""Images with more than 8 bits a channel, in every file format that holds them; each is (bytes, values)."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.unit.data.bombs import png_chunk

Values = NDArray[Any]


def png16(values: Values, *, extra: bytes = b"") -> bytes:
    """PNG of 16 bits: grey, grey with alpha, RGB or RGBA by the number of channels."""
    height, width = values.shape[:2]
    color = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff_of(values: Values, *, order: str = "<", photometric: int | None = None, orientation: int = 1) -> bytes:
    """Uncompressed TIFF of any type of number and any number of bands."""
    height, width, bands = values.shape if values.ndim == 3 else (*values.shape, 1)
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    content = values.astype(values.dtype.newbyteorder(order)).tobytes()  # type: ignore[arg-type]
    photometric = (2 if bands >= 3 else 1) if photometric is None else photometric
    colours = 4 if photometric == 5 else 3 if photometric == 2 else 1
    tags = {
        256: [width],
        257: [height],
        258: [8 * values.dtype.itemsize] * bands,
        259: [1],
        262: [photometric],
        273: [8],
        274: [orientation],
        277: [bands],
        278: [height],
        279: [len(content)],
        339: [kind] * bands,
    }
    if bands > colours:
        tags[338] = [2] + [0] * (bands - colours - 1)
    start = 8 + len(content)
    entries, arrays = b"", b""
    for tag, numbers in sorted(tags.items()):
        field_type, letter = (4, "I") if tag in (273, 279) else (3, "H")
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        place = packed.ljust(4, b"\x00")
        if len(packed) > 4:
            place = struct.pack(f"{order}I", start + 2 + 12 * len(tags) + 4 + len(arrays))
            arrays += packed
        entries += struct.pack(f"{order}HHI", tag, field_type, len(numbers)) + place
    head = (b"II*\x00" if order == "<" else b"MM\x00*") + struct.pack(f"{order}I", start)
    return head + content + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + arrays


def pnm(magic: bytes, values: Values, max_value: int) -> bytes:
    """P5 or P6 of 16 bits."""
    height, width = values.shape[:2]
    return b"%b\n%d %d\n%d\n" % (magic, width, height, max_value) + values.astype(">u2").tobytes()


def pfm(values: Values) -> bytes:
    """Portable float map of grey, whose rows run upwards."""
    height, width = values.shape
    return b"Pf\n%d %d\n-1.0\n" % (width, height) + values[::-1].astype("<f4").tobytes()


def jpeg2000(values: Values, *, precision: int) -> bytes:
    """Lossless JPEG 2000 of at most 16 bits.

    OpenCV writes 16 bits only. A decoder adds half of the full range, so values moved by the difference of two halves and
    the other precision in the header are what an encoder of that precision would have written.
    """
    moved = (values.astype(np.int64) + 2**15 - 2 ** (precision - 1)).astype(np.uint16)
    channels_last = moved if moved.ndim == 2 else moved[..., ::-1]
    done, buffer = cv2.imencode(".jp2", channels_last, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    assert done
    image = bytearray(buffer.tobytes())
    start = image.find(b"\xff\x4f\xff\x51")
    for component in range(1 if values.ndim == 2 else values.shape[2]):
        image[start + 42 + 3 * component] = precision - 1
    image[image.find(b"ihdr") + 14] = precision - 1
    return bytes(image)


def avif(values: Values, *, depth: int) -> bytes:
    """Lossless AVIF of 10 or 12 bits."""
    channels_last = values if values.ndim == 2 else values[..., ::-1]
    options = [cv2.IMWRITE_AVIF_DEPTH, depth, cv2.IMWRITE_AVIF_QUALITY, 100, cv2.IMWRITE_AVIF_SPEED, 9]
    done, buffer = cv2.imencode(".avif", channels_last, options)
    assert done
    return bytes(buffer.tobytes())


def saved(values: Values, kind: str, **options: Any) -> bytes:
    """What Pillow writes."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()
