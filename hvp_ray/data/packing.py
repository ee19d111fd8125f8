"""Pack the images of any source into shards (`shard_format.py`): decode each image once as a check, then copy its bytes.

The source alone determines how samples are split into tasks. A task writes its shards and then a note, which commits it. So
any number of processes, killed and restarted any number of times, write the same bytes. `packing_pool.py` runs the processes,
`hvp-ray pack` is the program.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.decode import check_decodes
from hvp_ray.data.file_set import FileSet
from hvp_ray.data.formats import FILE_ENDINGS
from hvp_ray.data.shard_format import (
    BLOCK_DTYPE,
    BLOCKS,
    LABEL_DTYPE,
    LABELS,
    MANIFEST,
    MAX_BLOCK_BYTES,
    MAX_BLOCK_ROWS,
    SCHEMA,
    UNREADABLE,
    Manifest,
    ShardEntry,
    manifest_from_json,
    manifest_to_json,
)
from hvp_ray.data.shards import ShardSource
from hvp_ray.data.source import PLAN, UNLABELLED, Source, open_source
from hvp_ray.errors import ConfigError, DataError, UnreadableImageError, first_line
from hvp_ray.files import Folder, is_uri

_NOTE = "task-{:06d}.json"
_IMAGES_AT_ONCE = 32
_REQUESTS_AT_ONCE = 16
_JUDGED_AFTER_IMAGES = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingPlan:
    """Everything that determines the bytes of the shards. It is stored beside them and compared when packing continues."""

    source_fingerprint: str
    num_samples: int
    shard_mib: int
    """A shard is closed at this many MiB of images."""
    image_column: str | None
    label_column: str | None
    max_image_pixels: int
    max_image_mib: int
    channels: int = 3
    task_starts: tuple[int, ...]
    """First sample id of each task, and the number of samples."""
    root: str
    """Prefix that is removed from the images' names."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that the manifest stores. Tasks follow from them, and the source may move."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("task_starts", "root")}


@dataclass(frozen=True, kw_only=True, slots=True)
class PackResult:
    """Counts that the program prints at the end."""

    num_images: int
    num_unreadable: int
    num_shards: int
    num_bytes: int
    """Size of all shards."""
    was_complete: bool
    """Whether there was nothing to do."""


def plan_packing(source: Source, config: DataConfig, *, shard_mib: int, root: str) -> PackingPlan:
    """Split the samples into tasks of about `shard_mib`, at block boundaries if the source reads whole blocks."""
    per_image = max(1.0, source.num_bytes / source.num_samples)
    per_task = max(1, int(shard_mib * 2**20 / per_image))
    cuts = np.arange(0, source.num_samples, per_task)
    if source.block_starts is not None and source.reads_whole_blocks:
        # Two tasks would read a shared block twice.
        ends = np.append(source.block_starts, source.num_samples)
        cuts = np.unique(ends[np.searchsorted(ends, cuts)])
        cuts = cuts[cuts < source.num_samples]
    return PackingPlan(
        source_fingerprint=source.fingerprint(),
        num_samples=source.num_samples,
        shard_mib=shard_mib,
        image_column=config.image_column,
        label_column=config.label_column,
        max_image_pixels=config.max_image_pixels,
        max_image_mib=config.max_image_mib,
        channels=config.channels,
        task_starts=(*cuts.tolist(), source.num_samples),
        root=root,
    )


class Target:
    """The folder of the shards, a path or a URI."""

    def __init__(self, location: str) -> None:
        """Open the folder, which need not exist.

        Raises:
            ConfigError: a URI that cannot be used.
        """
        self.location = location
        path = Path(location).expanduser()
        if not is_uri(location) and path.exists() and not path.is_dir():
            raise ConfigError(f"TARGET {location} is a file; expected a folder that is new or empty")
        self.folder = Folder(location if is_uri(location) else str(path), option="TARGET")

    def begin(self, plan: PackingPlan) -> Manifest | None:
        """Claim the folder for a plan, or continue the same plan; return the manifest if packing is complete.

        Raises:
            ConfigError: the folder holds something else, or shards of another source or other settings.
        """
        names = self.folder.names()
        if MANIFEST in names:
            manifest = manifest_from_json(self.folder.read(MANIFEST) or b"", f"{self.location}/{MANIFEST}")
            self._compare(manifest.plan, plan)
            return manifest
        if PLAN in names:
            try:
                before = json.loads(self.folder.read(PLAN) or b"")
            except ValueError as error:
                raise ConfigError(
                    f"{self.location}/{PLAN} is damaged ({first_line(error)}); empty the folder"
                ) from error
            self._compare(before, plan)
            return None
        if names:
            raise ConfigError(
                f"TARGET {self.location} is not empty ({names[0]}, ...), and hvp-ray pack did not make it; name a new folder"
            )
        self.folder.write(PLAN, json.dumps(plan.to_dict(), indent=1).encode())
        return None

    def finished_tasks(self) -> dict[int, tuple[int, int]]:
        """Return the tasks whose note and shards are complete: number -> images packed, images left out."""
        sizes = FileSet(self.location, recursive=False, option="TARGET").sizes
        numbers = [int(name[5:11]) for name in sizes if name.startswith("task-") and name[5:11].isdecimal()]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            notes = dict(zip(numbers, pool.map(self.note, numbers), strict=True))
        return {
            number: (len(note["labels"]), len(note["left_out"]))
            for number, note in notes.items()
            if all(sizes.get(shard["name"]) == shard["bytes"] for shard in note["shards"])
        }

    def note(self, number: int) -> dict[str, Any]:
        """Return the note on a finished task.

        Raises:
            DataError: it is missing or damaged.
        """
        content = self.folder.read(_NOTE.format(number))
        try:
            note: dict[str, Any] = json.loads(content or b"")
        except ValueError as error:
            raise DataError(
                f"{self.location}/{_NOTE.format(number)} is damaged; delete it and give the same command again"
            ) from error
        return note

    def _compare(self, before: dict[str, Any], plan: PackingPlan) -> None:
        now = plan.to_dict()
        different = [
            f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if different:
            raise ConfigError(
                f"TARGET {self.location} holds shards of another source or other settings ({'; '.join(different)}); name a "
                f"new folder, or give the same source and settings"
            )


def pack_task(
    source: Source,
    plan: PackingPlan,
    target: Target,
    number: int,
    *,
    labels: NDArray[np.int64] | None,
    is_strict: bool,
    report: Callable[[int, int], None] = lambda _images, _sample_id: None,
) -> tuple[int, int]:
    """Read, decode and write the images of one task; return the numbers of images packed and left out.

    Args:
        source: source of the images.
        plan: plan of the packing.
        target: folder of the shards.
        number: number of the task.
        labels: labels of this task's samples. None: there are no labels.
        is_strict: stop at the first unreadable image.
        report: called with the number of images done since the last call, and the next id.

    Raises:
        DataError: an image is unreadable and `is_strict`, or the source is damaged.
        OSError: source or target failed.
    """
    task = _Task(number, plan.shard_mib * 2**20, target)
    ids = range(plan.task_starts[number], plan.task_starts[number + 1])
    for begin in range(0, len(ids), _IMAGES_AT_ONCE):
        part = ids[begin : begin + _IMAGES_AT_ONCE]
        for sample_id, image in zip(part, source.read(part), strict=True):
            report(0, sample_id)
            name = source.describe(sample_id).removeprefix(plan.root).lstrip("/")
            try:
                check_decodes(image, max_pixels=plan.max_image_pixels, channels=plan.channels)
            except UnreadableImageError as error:
                if is_strict:
                    raise DataError(
                        f"{source.describe(sample_id)} is unreadable: {error}; without --strict it is left out"
                    ) from error
                task.leave_out(sample_id, name, str(error))
                continue
            task.add(image, UNLABELLED if labels is None else int(labels[sample_id - ids[0]]), name)
        report(len(part), part[-1])
    return task.finish()


class _Task:
    """Collect the images of one task and write its shards."""

    def __init__(self, number: int, shard_bytes: int, target: Target) -> None:
        self._number = number
        self._shard_bytes = shard_bytes
        self._target = target
        self._rows: list[tuple[bytes, int, str]] = []
        self._row_bytes = 0
        self._sink: Any = None
        self._bytes_of_shard = 0
        self._shards: list[dict[str, Any]] = []
        self._blocks: list[list[int]] = []
        self._labels: list[int] = []
        self._left_out: list[dict[str, Any]] = []

    def add(self, image: bytes, label: int, name: str) -> None:
        """Append an image."""
        self._rows.append((image, label, name))
        self._row_bytes += len(image)
        if len(self._rows) == MAX_BLOCK_ROWS or self._row_bytes >= MAX_BLOCK_BYTES:
            self._close_block()
            if self._bytes_of_shard >= self._shard_bytes:
                self._close_shard()

    def leave_out(self, sample_id: int, name: str, reason: str) -> None:
        """Record an image that cannot be decoded."""
        self._left_out.append({"source_id": sample_id, "path": name, "reason": reason})

    def finish(self) -> tuple[int, int]:
        """Write the last shard, and the note that commits the task."""
        self._close_block()
        self._close_shard()
        note = {
            "shards": self._shards,
            "blocks": self._blocks,
            "labels": self._labels,
            "left_out": self._left_out,
        }
        self._target.folder.write(_NOTE.format(self._number), json.dumps(note).encode())
        return len(self._labels), len(self._left_out)

    def _close_block(self) -> None:
        if not self._rows:
            return
        if self._sink is None:
            self._sink = pa.BufferOutputStream()
            self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        images, labels, names = zip(*self._rows, strict=True)
        columns = [
            pa.array([zlib.crc32(image) for image in images], pa.uint32()),
            pa.array(images, pa.binary()),
            pa.array(labels, pa.int64()),
            pa.array([name.encode("utf-8", "replace").decode() for name in names], pa.string()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._labels += labels
        self._bytes_of_shard += self._row_bytes
        self._rows, self._row_bytes = [], 0

    def _close_shard(self) -> None:
        if self._sink is None:
            return
        self._writer.close()
        content = self._sink.getvalue()
        name = f"shard-{self._number:06d}-{len(self._shards):04d}.arrow"
        blocks = _blocks_of(content)
        self._blocks += [[len(self._shards), *block] for block in blocks]
        self._target.folder.write(name, content)
        self._shards.append(
            {
                "name": name,
                "rows": sum(block[0] for block in blocks),
                "bytes": content.size,
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
        self._sink, self._bytes_of_shard = None, 0


def _blocks_of(shard: pa.Buffer) -> list[list[int]]:
    """Return, for each record batch, its rows and the offsets of its buffers, found by opening the shard without a copy."""
    reader = pa.ipc.open_file(shard)
    found = []
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        _, checksums = batch.column(0).buffers()
        _, offsets, data = batch.column(1).buffers()
        rows = batch.num_rows
        heads = [memoryview(checksums)[: 4 * rows], memoryview(offsets)[: 4 * rows + 4]]
        places = [buffer.address - shard.address for buffer in (checksums, offsets, data)]
        num_bytes = int(np.frombuffer(heads[1], "<i4")[-1])
        found.append([rows, *places, num_bytes, zlib.crc32(heads[1], zlib.crc32(heads[0]))])
    return found


def commit(
    plan: PackingPlan, target: Target, *, class_names: Sequence[str], max_unreadable_fraction: float
) -> Manifest:
    """Write the tables and, last, the manifest; then delete plan and notes.

    Raises:
        DataError: too many images were left out, or all; or a note is damaged.
    """
    shards: list[ShardEntry] = []
    blocks, labels, left_out = [], [], []
    for number in range(len(plan.task_starts) - 1):
        note = target.note(number)
        entries = [(len(shards) + shard, *numbers) for shard, *numbers in note["blocks"]]
        blocks.append(np.array(entries, BLOCK_DTYPE))
        labels.append(np.array(note["labels"], LABEL_DTYPE))
        left_out += note["left_out"]
        shards += [ShardEntry(**shard) for shard in note["shards"]]
    sizes = FileSet(target.location, recursive=False, option="TARGET").sizes
    for shard in shards:
        if sizes.get(shard.name) != shard.bytes:
            raise DataError(
                f"{target.location}/{shard.name} has changed since it was written; give the same command again"
            )
    first = f"{left_out[0]['path']}: {left_out[0]['reason']}" if left_out else None
    check_unreadable(len(left_out), plan.num_samples, max_unreadable_fraction, is_final=True, first=first)
    all_labels, all_blocks = np.concatenate(labels), np.concatenate(blocks)
    manifest = Manifest(
        num_images=len(all_labels),
        num_blocks=len(all_blocks),
        num_labelled=int((all_labels != UNLABELLED).sum()),
        num_unreadable=len(left_out),
        class_names=tuple(class_names),
        blocks_sha256=hashlib.sha256(all_blocks.tobytes()).hexdigest(),
        labels_sha256=hashlib.sha256(all_labels.tobytes()).hexdigest(),
        plan=plan.to_dict(),
        shards=tuple(shards),
    )
    target.folder.write(BLOCKS, all_blocks.tobytes())
    target.folder.write(LABELS, all_labels.tobytes())
    if left_out:
        lines = "".join(json.dumps(entry) + "\n" for entry in left_out)
        target.folder.write(UNREADABLE, lines.encode())
    target.folder.write(MANIFEST, manifest_to_json(manifest))
    clean_up(target)
    return manifest


def clean_up(target: Target) -> None:
    """Delete plan and notes beside a manifest."""
    for name in target.folder.names():
        if name == PLAN or name.startswith("task-"):
            target.folder.delete(name)


def check_unreadable(
    num_unreadable: int, num_seen: int, max_fraction: float, *, is_final: bool = False, first: str | None = None
) -> None:
    """Stop if too many images are unreadable. Checked after 1,000 images, and at the end.

    Args:
        num_unreadable: images left out.
        num_seen: images packed or left out.
        max_fraction: share of unreadable images that is allowed.
        is_final: whether these are all images.
        first: place and reason of the first unreadable image, if it is known.

    Raises:
        DataError: there are more than `max_fraction`, or all are.
    """
    if num_seen < _JUDGED_AFTER_IMAGES and not (is_final and num_unreadable == num_seen):
        return
    if num_unreadable > max_fraction * num_seen or num_unreadable == num_seen:
        raise DataError(
            f"{num_unreadable} of {num_seen} images are unreadable, more than --max-unreadable-fraction {max_fraction}"
            + (f" (the first, {first})" if first else "")
            + "; check the source, or raise the limit"
        )


def verify_shards(location: str, show: Callable[[int, int], None]) -> Manifest:
    """Read all shards and compare their digests; call `show` with the bytes read, and of all shards.

    Raises:
        DataError: a shard is missing or damaged.
    """
    files = FileSet(location, recursive=False, option="TARGET")
    if MANIFEST not in files.sizes:
        raise DataError(f"{location} has no {MANIFEST}: it is not packed, or packing did not finish")
    try:
        source = ShardSource(files, cache_bytes=0, max_image_bytes=2**31)
        manifest = manifest_from_json(files.read(MANIFEST, max_bytes=2**28), files.shown(MANIFEST))
        num_done, num_bytes = 0, sum(shard.bytes for shard in manifest.shards)
        for shard in manifest.shards:
            source.verify(shard)
            num_done += shard.bytes
            show(num_done, num_bytes)
        source.verify_labels()
    except OSError as error:
        raise DataError(f"{location} cannot be read: {first_line(error)}") from error
    return manifest


def open_for_packing(location: str, config: DataConfig) -> tuple[Source, str]:
    """Open a source to read its images once, in order; return it and the prefix that is removed from their names.

    Raises:
        DataError: it cannot be used.
    """
    source = open_source(location, config, in_order=True)
    root = location.partition("?")[0].rstrip("/") if is_uri(location) else str(Path(location).expanduser())
    if "*" in root.rpartition("/")[2] or root.lower().endswith(FILE_ENDINGS):
        root = root.rpartition("/")[0]
    return source, root
