"""Append-only journals in a run's folder: one JSON object a line, flushed at once.

`metrics.jsonl` is the truth about a run; MLflow is fed from it. `unreadable-rank-<r>.jsonl` holds each decision on
an unreadable image, so that a resumed run makes the same ones.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hvp_ray.errors import CheckpointError, DataError
from hvp_ray.records import Replacement, ViewBatch

_JUDGED_AFTER_IMAGES = 1000
_BLOCK_BYTES = 65_536


class Journal:
    """A file of JSON lines that one process appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record.

        Raises:
            CheckpointError: the disk is full, or refuses for another reason. Half a line is cut off by whoever goes on.
        """
        line = (json.dumps(record) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._refused(error) from error
        if written != len(line):
            raise self._refused("no space left")

    def _refused(self, why: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be written: {why}. The last checkpoint is untouched; make room or mend the storage, then "
            f"start the run again with its name to go on"
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Drop what a crash or a full disk left behind the last newline: the next record would be glued to it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole > 0:
            start = max(0, whole - _BLOCK_BYTES)
            file.seek(start)
            found = file.read(whole - start).rfind(b"\n")
            if found >= 0:
                whole = start + found + 1
                break
            whole = start
        if whole < end:
            file.truncate(whole)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal; a last line that was cut off by a crash is left out."""
    return (record for _, record in read_journal_from(path, 0))


def read_journal_from(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset behind the record, record) for the complete lines from byte `offset` on."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if line.endswith(b"\n"):
                offset += len(line)
                try:
                    yield offset, json.loads(line)
                except json.JSONDecodeError:
                    continue


def truncate_journal(path: Path, *, last_step: int) -> None:
    """Drop the records of steps behind `last_step`: a resumed run writes them again."""
    if not path.exists():
        return
    kept = [record for record in read_journal(path) if record["step"] <= last_step]
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


class UnreadableLog:
    """Decisions on unreadable images of one rank, and the budget for them.

    A rank writes `unreadable-rank-<rank>.jsonl` and reads those of all ranks: with another number of trainers than before,
    a position may have been another rank's.
    """

    def __init__(self, run_dir: Path, *, rank: int, images_per_rank: int, max_fraction: float) -> None:
        self._first_index = rank * images_per_rank
        self._max_fraction = max_fraction
        self.known: dict[int, tuple[Replacement, ...]] = {}
        """Step -> decisions, of earlier attempts at this run, on steps that are not done yet."""
        for path in sorted(run_dir.glob("unreadable-rank-*.jsonl")):
            for record in read_journal(path):
                decisions = [Replacement(**decision) for decision in record["replacements"]]
                moved = [replace(d, index=d.index + record["first_index"] - self._first_index) for d in decisions]
                here = tuple(d for d in moved if 0 <= d.index < images_per_rank)
                others = self.known.get(record["step"], ())
                taken = {d.index for d in others}
                if here:
                    self.known[record["step"]] = (*others, *(d for d in here if d.index not in taken))
        self._journal = Journal(run_dir / f"unreadable-rank-{rank}.jsonl")
        self.num_images = 0
        self.num_unreadable = 0

    def take(self, batch: ViewBatch) -> None:
        """Count a batch and write down its decisions, before it is trained on.

        Raises:
            DataError: more than the allowed share of the images is unreadable.
        """
        self.num_images += len(batch.sample_ids)
        if not batch.replacements:
            return
        self.num_unreadable += len(batch.replacements)
        known = {replacement.index for replacement in self.known.pop(batch.step, ())}
        if any(replacement.index not in known for replacement in batch.replacements):
            decisions = [asdict(replacement) for replacement in batch.replacements]
            self._journal.write({"step": batch.step, "first_index": self._first_index, "replacements": decisions})
        fraction = self.num_unreadable / self.num_images
        if self.num_images >= _JUDGED_AFTER_IMAGES and fraction > self._max_fraction:
            last = batch.replacements[-1]
            raise DataError(
                f"{self.num_unreadable} of {self.num_images} images are unreadable ({fraction:.1%}), more than "
                f"data.max_unreadable_fraction={self._max_fraction}; the last one, {last.place}: {last.reason}. Repair "
                f"the data ({self._journal.path} lists them), or raise the limit"
            )

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()
