"""The format of packed shards. `packing.py` writes it, `shards.py` reads it.

    manifest.json        counts, and name, rows, bytes and SHA-256 of every shard; written last, as the commit
    shard-*.arrow        uncompressed Arrow IPC files; every record batch is a block of images
    blocks.bin           one entry per block: its shard, and the offsets of its buffers
    labels.bin           int32, little-endian, one per image
    unreadable.jsonl     images that were left out, with the reason; absent if there are none

Any Arrow library reads the shards (columns crc32, image, label, path). hvp_ray reads the bytes of single images by the
offsets in `blocks.bin`, so an image costs its own bytes only. Everything that is read has a checksum: images and offsets a
CRC-32, the small files a SHA-256. `hvp-ray pack --verify` compares the SHA-256 of shards.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hvp_ray.errors import DataError, first_line

FORMAT = "hvp_ray shards"
VERSION = 1

MANIFEST = "manifest.json"
BLOCKS = "blocks.bin"
LABELS = "labels.bin"
UNREADABLE = "unreadable.jsonl"

MAX_BLOCK_ROWS = 256
"""Samples are shuffled in windows of blocks, so small blocks mix better. Reads do not benefit from large ones."""
MAX_BLOCK_BYTES = 8 * 2**20
"""A block is closed at this size; only its last image may exceed it."""

_MAX_MANIFEST_BYTES = 256 * 2**20
_MAX_SHARD_BYTES = 2**40
_NAME = re.compile(r"shard-\d{6}-\d{4}\.arrow")
_SHA256 = re.compile(r"[0-9a-f]{64}")

SCHEMA = pa.schema(
    [
        pa.field("crc32", pa.uint32(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
    ]
)

BLOCK_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("rows", "<u4"),
        ("crc32_at", "<u8"),
        ("offsets_at", "<u8"),
        ("data_at", "<u8"),
        ("data_bytes", "<u8"),
        ("head_crc32", "<u4"),
    ]
)
"""A block: its shard, its rows, the offsets of its three buffers in the file, bytes of all images, and the CRC-32 of the
first two buffers, concatenated. 44 bytes."""

LABEL_DTYPE = np.dtype("<i4")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """Entry of the manifest for one shard."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """`manifest.json`."""

    num_images: int
    num_blocks: int
    num_labelled: int
    num_unreadable: int
    class_names: tuple[str, ...]
    """Names of the classes, in the order of their labels; empty: unknown."""
    blocks_sha256: str
    labels_sha256: str
    plan: dict[str, Any]
    """Source and settings of the packing (`packing.py`)."""
    shards: tuple[ShardEntry, ...]


def manifest_to_json(manifest: Manifest) -> bytes:
    """Return the content of the manifest's file, one line per shard."""
    fields = dataclasses.asdict(manifest)
    lines = [json.dumps(shard) for shard in fields.pop("shards")]
    head = {"format": FORMAT, "version": VERSION} | fields
    text = json.dumps(head, indent=1)[:-2] + ',\n "shards": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    return text.encode()


def manifest_from_json(content: bytes, where: str) -> Manifest:
    """Parse and check a manifest of unknown origin.

    Raises:
        DataError: it is no manifest, has another version, or is damaged.
    """
    refusal = f"{where} is no manifest of packed shards"
    if len(content) > _MAX_MANIFEST_BYTES:
        raise DataError(f"{refusal}: it has more than {_MAX_MANIFEST_BYTES // 2**20} MiB")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{refusal}: {first_line(error)}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(f"{refusal}: it lacks the format name; pack images with hvp-ray pack")
    if values.get("version") != VERSION:
        raise DataError(
            f"{where} is of version {values.get('version')!r}, this program reads version {VERSION}; pack again"
        )
    try:
        manifest = Manifest(
            num_images=_count(values["num_images"], 2**40),
            num_blocks=_count(values["num_blocks"], 2**40),
            num_labelled=_count(values["num_labelled"], 2**40),
            num_unreadable=_count(values["num_unreadable"], 2**40),
            class_names=tuple(_text(name) for name in values["class_names"]),
            blocks_sha256=_digest(values["blocks_sha256"]),
            labels_sha256=_digest(values["labels_sha256"]),
            plan=dict(values["plan"]),
            shards=tuple(
                ShardEntry(
                    name=_shard_name(shard["name"]),
                    rows=_count(shard["rows"], 2**40),
                    bytes=_count(shard["bytes"], _MAX_SHARD_BYTES),
                    sha256=_digest(shard["sha256"]),
                )
                for shard in values["shards"]
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is damaged: {type(error).__name__}: {first_line(error)}") from error
    names = {shard.name for shard in manifest.shards}
    if sum(shard.rows for shard in manifest.shards) != manifest.num_images or len(names) != len(manifest.shards):
        raise DataError(f"{where} is damaged: its shards do not add up to its {manifest.num_images} images")
    if not manifest.num_images or manifest.num_labelled > manifest.num_images:
        raise DataError(f"{where} is damaged: {manifest.num_labelled} labels of {manifest.num_images} images")
    return manifest


def _count(value: object, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise ValueError(f"{str(value)[:40]!r} instead of a count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} instead of a name")
    return value


def _digest(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{str(value)[:40]!r} instead of a SHA-256")
    return value


def _shard_name(value: object) -> str:
    # The name is opened, so no path may pass.
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{str(value)[:80]!r} is not the name of a shard")
    return value
