"""Packed shards (`shard_format.py`) on this machine or at a URI, read image by image.

Opening reads the manifest and the table of blocks (under one byte per image of usual size), and checks that all shards exist.
An image costs its own bytes and a share of its block's offsets, so parallel workers read nothing twice. A set at a URI
that fits into the node's cache is read by whole blocks instead, in fewer requests.
"""

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvp_ray.data.block_cache import BlockCache, EncodedBlock
from hvp_ray.data.file_set import FileSet
from hvp_ray.data.listing import LeftOut
from hvp_ray.data.shard_format import (
    BLOCK_DTYPE,
    BLOCKS,
    LABEL_DTYPE,
    LABELS,
    MANIFEST,
    MAX_BLOCK_ROWS,
    UNREADABLE,
    ShardEntry,
    manifest_from_json,
)
from hvp_ray.data.source import MAX_LABEL, PLAN, UNLABELLED, Place, Source
from hvp_ray.errors import DataError, LabelError

_MAX_MANIFEST_BYTES = 2**28
_HEADS_IN_MEMORY = 16_384
"""Blocks whose offsets and checksums stay in memory, at most 2 KiB each."""
_REQUESTS_AT_ONCE = 32
_GAP_BYTES = 16_384
"""Behind a URI, one request fetches images of a batch that are at most this far apart."""
_VERIFY_BYTES = 8 * 2**20


def open_shards(place: Place) -> Source | None:
    """Return the packed shards that lie there.

    Raises:
        DataError: they are damaged, or packing has not finished.
    """
    if place.path is None:
        found = [name for name in (MANIFEST, PLAN) if name in place.files.sizes]
    else:
        found = [name for name in (MANIFEST, PLAN) if (place.path / name).is_file()]
    if MANIFEST in found:
        files = place.files if place.path is None else FileSet(place.location, recursive=False)
        return ShardSource(files, cache_bytes=place.cache_bytes, max_image_bytes=place.max_image_bytes)
    if found:
        raise DataError(
            f"data.source={place.location!r} is not packed completely; give the command of hvp-ray pack again to "
            f"continue"
        )
    return None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Head:
    """Offsets and checksums of the images of a block."""

    offsets: NDArray[np.int64]
    """[rows + 1], relative to the block's data."""
    crc32: NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Range:
    """Bytes of one image in its shard."""

    index: int
    """Index in the batch."""
    shard: int
    start: int
    end: int
    crc32: int
    sample_id: int


class ShardSource(Source):
    """Images in packed shards; ids keep the order of the packed source."""

    kind = "packed shards"

    def __init__(self, files: FileSet, *, cache_bytes: int, max_image_bytes: int) -> None:
        """Read the manifest and the table of blocks.

        Args:
            files: files of the folder.
            cache_bytes: disk of this node for blocks, used if the files are at a URI and all images fit. 0: none.
            max_image_bytes: larger images are returned as no bytes.

        Raises:
            DataError: the manifest or the table is damaged, or a shard is missing or has another size.
            StorageError: they cannot be read.
        """
        self._files = files
        self._max_image_bytes = max_image_bytes
        where = files.shown(MANIFEST)
        manifest = manifest_from_json(files.read(MANIFEST, max_bytes=_MAX_MANIFEST_BYTES), where)
        for shard in manifest.shards:
            if files.sizes.get(shard.name) != shard.bytes:
                found = f"{files.sizes[shard.name]} bytes" if shard.name in files.sizes else "nothing"
                raise DataError(
                    f"{files.shown(shard.name)}: expected {shard.bytes} bytes, found {found}; copy the folder again, or pack "
                    f"again"
                )
        self._shards = np.array([shard.name for shard in manifest.shards], dtype=np.bytes_)
        self._blocks = np.frombuffer(
            self._read_small(BLOCKS, manifest.blocks_sha256, manifest.num_blocks * BLOCK_DTYPE.itemsize), BLOCK_DTYPE
        )
        self._starts = np.concatenate([[0], np.cumsum(self._blocks["rows"], dtype=np.int64)])
        self._check_blocks(manifest.shards)
        self.num_samples, self.block_starts = int(self._starts[-1]), self._starts[:-1]
        self.num_bytes = int(self._blocks["data_bytes"].sum())
        self.has_labels = manifest.num_labelled > 0
        self._labels_sha256 = manifest.labels_sha256
        self._fingerprint = hashlib.sha256(
            "".join(f"{shard.sha256} {shard.rows}\n" for shard in manifest.shards).encode()
        ).hexdigest()
        self.class_names = manifest.class_names
        if count := manifest.num_unreadable:
            self.left_out = (LeftOut(reason="unreadable when packed", count=count, example=UNREADABLE),)
        self._heads: OrderedDict[int, _Head] = OrderedDict()
        self._cache: BlockCache | None = None
        if files.is_remote and cache_bytes >= self.num_bytes:
            self._cache = BlockCache(f"{self._fingerprint} {max_image_bytes}", max_bytes=cache_bytes)
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, "shards") if files.is_remote else None

    @property
    def num_bytes_read(self) -> int:
        """Bytes that the storage has returned to this process."""
        return self._files.num_bytes_read

    def read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return labels and class names of the packed source.

        Raises:
            LabelError: it had no labels, or they are damaged.
            DataError: they cannot be read.
        """
        if not self.has_labels:
            raise LabelError(f"{self._files.location} has no labels: it was packed from images without usable labels")
        try:
            content = self.verify_labels()
        except OSError as error:
            raise DataError(f"the labels of {self._files.location} cannot be read: {error}") from error
        except DataError as error:
            raise LabelError(str(error)) from error
        labels = np.frombuffer(content, LABEL_DTYPE).astype(np.int64)
        largest = len(self.class_names) - 1 if self.class_names else MAX_LABEL
        if labels.min() < UNLABELLED or labels.max() > largest:
            raise LabelError(
                f"{self._files.shown(LABELS)} has labels from {labels.min()} to {labels.max()}; expected {UNLABELLED} to "
                f"{largest}; pack again"
            )
        return labels, self.class_names

    def fingerprint(self) -> str:
        """Return a digest of the shards' digests, which cover every byte."""
        return self._fingerprint

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the images' bytes. No bytes: an image is larger than allowed, and counts as unreadable.

        Raises:
            DataError: an image is not the one that was packed.
            StorageError: the storage failed.
        """
        blocks = np.searchsorted(self._starts, np.asarray(sample_ids), side="right") - 1
        if self._cache is not None:
            return self._read_blocks(sample_ids, blocks)
        self._fetch_heads(np.unique(blocks).tolist())
        ranges = []
        for index, (sample_id, block) in enumerate(zip(sample_ids, blocks.tolist(), strict=True)):
            head, row = self._head(block), sample_id - int(self._starts[block])
            start, end = int(head.offsets[row]), int(head.offsets[row + 1])
            at = int(self._blocks["data_at"][block])
            if end - start <= self._max_image_bytes:
                ranges.append(
                    _Range(
                        index=index,
                        shard=int(self._blocks["shard"][block]),
                        start=at + start,
                        end=at + end,
                        crc32=int(head.crc32[row]),
                        sample_id=sample_id,
                    )
                )
        images: list[bytes] = [b""] * len(sample_ids)
        runs = self._runs(ranges)
        for found in map(self._read_run, runs) if self._pool is None else self._pool.map(self._read_run, runs):
            for index, image in found:
                images[index] = image
        return images

    def describe(self, sample_id: int) -> str:
        """Return shard and row."""
        block = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        shard = int(self._blocks["shard"][block])
        first = int(self._starts[np.searchsorted(self._blocks["shard"], shard)])
        return f"{self._shown(shard)} row {sample_id - first}"

    def verify(self, entry: ShardEntry) -> None:
        """Read a whole shard and compare its digest.

        Raises:
            DataError: it is damaged.
            StorageError: it cannot be read.
        """
        digest = hashlib.sha256()
        file = self._files.open(entry.name)
        for start in range(0, entry.bytes, _VERIFY_BYTES):
            digest.update(file.read_at(start, min(_VERIFY_BYTES, entry.bytes - start)))
        if digest.hexdigest() != entry.sha256:
            raise DataError(
                f"{file.shown} is damaged: its SHA-256 differs from the manifest; copy it again, or pack again"
            )

    def verify_labels(self) -> bytes:
        """Read the labels, compare their digest, and return the content of their file.

        Raises:
            DataError: they are damaged.
            StorageError: they cannot be read.
        """
        return self._read_small(LABELS, self._labels_sha256, self.num_samples * LABEL_DTYPE.itemsize)

    def _read_small(self, name: str, sha256: str, num_bytes: int) -> bytes:
        """Read a table whose size and digest are known."""
        where = self._files.shown(name)
        if self._files.sizes.get(name) != num_bytes:
            raise DataError(
                f"{where}: expected {num_bytes} bytes, found {self._files.sizes.get(name, 'nothing')}; pack again"
            )
        content = self._files.read(name, max_bytes=num_bytes)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{where} is damaged: its SHA-256 differs from the manifest; copy it again, or pack again")
        return content

    def _check_blocks(self, shards: Sequence[ShardEntry]) -> None:
        """Check that blocks have possible sizes, lie inside their shards, and are in order."""
        blocks = self._blocks
        limit = 2**31 - 1  # offsets have 32 bits
        good = len(blocks) > 0 and self._starts[-1] == sum(shard.rows for shard in shards)
        good = good and bool(
            np.all(blocks["shard"] < len(shards)) and np.all(np.diff(blocks["shard"].astype(np.int64)) >= 0)
        )
        if good:
            sizes = np.array([shard.bytes for shard in shards], np.uint64)[blocks["shard"]]
            rows = blocks["rows"].astype(np.uint64)
            for name, num_bytes in (
                ("crc32_at", 4 * rows),
                ("offsets_at", 4 * rows + 4),
                ("data_at", blocks["data_bytes"]),
            ):
                good = good and bool(np.all(blocks[name] <= sizes) and np.all(num_bytes <= sizes - blocks[name]))
            in_shards = np.bincount(blocks["shard"], weights=blocks["rows"], minlength=len(shards))
            good = good and [int(n) for n in in_shards] == [shard.rows for shard in shards]
            good = good and rows.min() > 0 and rows.max() <= MAX_BLOCK_ROWS and blocks["data_bytes"].max() <= limit
        if not good:
            raise DataError(f"{self._files.shown(BLOCKS)} is damaged: it has blocks outside their shards; pack again")

    def _shown(self, shard: int) -> str:
        return self._files.shown(self._shards[shard].decode())

    def _read_at(self, shard: int, start: int, num_bytes: int) -> bytes:
        return self._files.open(self._shards[shard].decode()).read_at(start, num_bytes)

    def _fetch_heads(self, blocks: list[int]) -> None:
        """Load the heads of these blocks into memory."""
        missing = [block for block in blocks if block not in self._heads]
        heads = map(self._read_head, missing) if self._pool is None else self._pool.map(self._read_head, missing)
        self._heads.update(zip(missing, heads, strict=True))
        while len(self._heads) > max(_HEADS_IN_MEMORY, len(blocks)):
            oldest = next(iter(self._heads))
            del self._heads[oldest]

    def _head(self, block: int) -> _Head:
        return self._heads[block] if block in self._heads else self._read_head(block)

    def _read_head(self, block: int) -> _Head:
        entry = self._blocks[block]
        rows, shard = int(entry["rows"]), int(entry["shard"])
        begin, offsets_at = int(entry["crc32_at"]), int(entry["offsets_at"])
        size = offsets_at + 4 * rows + 4 - begin
        if 4 * rows <= offsets_at - begin <= 4 * rows + 64:  # adjacent, as they are packed
            both = self._read_at(shard, begin, size)
            checksums, offsets = both[: 4 * rows], both[offsets_at - begin :]
        else:
            checksums, offsets = self._read_at(shard, begin, 4 * rows), self._read_at(shard, offsets_at, 4 * rows + 4)
        found = np.frombuffer(offsets, "<i4").astype(np.int64)
        is_good = zlib.crc32(offsets, zlib.crc32(checksums)) == int(entry["head_crc32"])
        if not is_good or found[0] != 0 or found[-1] != int(entry["data_bytes"]) or np.diff(found).min() < 0:
            raise DataError(f"{self._shown(shard)}: block {block} is damaged (offsets of its images); {_WHAT_TO_DO}")
        return _Head(offsets=found, crc32=np.frombuffer(checksums, "<u4").astype(np.uint32))

    def _runs(self, ranges: list[_Range]) -> list[list[_Range]]:
        """Group images that one request fetches: equal ones, or ones close to each other in their shard."""
        runs: list[list[_Range]] = []
        gap = _GAP_BYTES if self._pool is not None else -1
        for image in sorted(ranges, key=lambda r: (r.shard, r.start, r.end)):
            last = runs[-1] if runs else None
            if last is not None and last[-1].shard == image.shard:
                used = sum(r.end - r.start for r in last) + image.end - image.start
                # Unused bytes stay below a fifth of the used ones.
                fits = image.start - last[-1].end <= gap and image.end - last[0].start <= 1.2 * used
                if image.start < last[-1].end or fits:
                    last.append(image)
                    continue
            runs.append([image])
        return runs

    def _read_run(self, run: list[_Range]) -> list[tuple[int, bytes]]:
        begin = run[0].start
        content = self._read_at(run[0].shard, begin, max(image.end for image in run) - begin)
        return [(image.index, self._checked(content[image.start - begin : image.end - begin], image)) for image in run]

    def _checked(self, content: bytes, image: _Range) -> bytes:
        if zlib.crc32(content) != image.crc32:
            raise DataError(
                f"{self.describe(image.sample_id)} is damaged: its bytes differ from the packed ones; {_WHAT_TO_DO}"
            )
        return content

    def _read_blocks(self, sample_ids: Sequence[int], blocks: NDArray[np.int64]) -> list[bytes]:
        """Read whole blocks through the node's cache."""
        assert self._cache is not None and self._pool is not None
        images: list[bytes] = [b""] * len(sample_ids)

        def read(block: int) -> list[tuple[int, bytes]]:
            assert self._cache is not None
            positions = np.flatnonzero(blocks == block).tolist()
            rows = [sample_ids[position] - int(self._starts[block]) for position in positions]
            return list(zip(positions, self._cache.read(block, rows, lambda: self._make_block(block)), strict=True))

        for found in self._pool.map(read, np.unique(blocks).tolist()):
            for position, image in found:
                images[position] = image
        return images

    def _make_block(self, block: int) -> EncodedBlock:
        head, entry = self._head(block), self._blocks[block]
        content = self._read_at(int(entry["shard"]), int(entry["data_at"]), int(entry["data_bytes"]))
        lengths = np.diff(head.offsets)
        for row, (start, length) in enumerate(zip(head.offsets.tolist(), lengths.tolist(), strict=False)):
            if zlib.crc32(content[start : start + length]) != int(head.crc32[row]):
                where = self.describe(int(self._starts[block]) + row)
                raise DataError(f"{where} is damaged: its bytes differ from the packed ones; {_WHAT_TO_DO}")
        lengths[lengths > self._max_image_bytes] = 0
        return EncodedBlock(entries=np.stack([head.offsets[:-1], lengths], axis=1), data=[memoryview(content)])


_WHAT_TO_DO = (
    "compare the shards with their digests by hvp-ray pack --verify FOLDER, then copy them again or pack again"
)
