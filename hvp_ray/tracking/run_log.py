"""The log of a run: append-only files, in one segment per checkpoint.

A segment is a folder, named by the attempt at the run and by the step that it starts after:

    <run>/log/attempt-0001-step-00000000/   the first attempt, until its checkpoint of step 500
              attempt-0001-step-00000500/   from that checkpoint until the process died
              attempt-0002-step-00000500/   the next attempt, which resumed from the checkpoint of step 500

It holds JSON lines (`metrics.jsonl`, `evaluations.jsonl`, `attempts.jsonl`, `unreadable-rank-<r>.jsonl`) and the choices
as Parquet (`selection-<step>.parquet`, see `selection_log.py`).

Writing: every checkpoint closes the open segment before it is committed and starts the next one. No closed segment is
opened again, so its files never change and `runs/storage.py` uploads each once.

Resuming: an attempt starts a segment at the step of its checkpoint, and nothing is truncated, deleted or rewritten. A reader
skips a record if a later attempt resumed from before its step. So all segments after that step drop out as a whole, the one
included that was open when the process died. The answer of an evaluation, which is written later than its step, stays.
Attempts and decisions on unreadable images are facts that a resume does not undo: they are read with `dropped=True`.

A finished run also has `metrics.jsonl` and `evaluations.jsonl` at its top, for people and their tools. hvp_ray never reads
these copies.
"""

import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvp_ray.errors import CheckpointError
from hvp_ray.files import Folder, write_file

FOLDER = "log"
METRICS, EVALUATIONS, ATTEMPTS = "metrics", "evaluations", "attempts"

_SEGMENT = re.compile(r"attempt-(\d{4,})-step-(\d{8,})")


@dataclass(frozen=True, order=True, slots=True)
class Segment:
    """The part of a log between two checkpoints of one attempt."""

    attempt: int
    first_step: int
    """Steps done when it was started."""

    def folder(self, run_dir: Path) -> Path:
        """Return the folder of its files."""
        return run_dir / FOLDER / f"attempt-{self.attempt:04d}-step-{self.first_step:08d}"


Position = tuple[Segment, int]
"""A segment, and bytes of one of its files."""

START: Position = (Segment(0, 0), 0)


class RunLog:
    """The log as one rank of one attempt writes it."""

    def __init__(self, run_dir: Path, *, attempt: int = 1, first_step: int = 0) -> None:
        """Start a segment.

        Args:
            run_dir: the run's folder.
            attempt: see `next_attempt`.
            first_step: step of the checkpoint that this attempt resumes from.

        Raises:
            CheckpointError: the disk refuses.
        """
        self.run_dir = run_dir
        self._attempt = attempt
        self.start_segment(first_step)

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Append a record to `<name>.jsonl` in the open segment.

        Raises:
            CheckpointError: the disk is full, or refuses for another reason.
        """
        line = (json.dumps(record) + "\n").encode()
        path = self.segment / f"{name}.jsonl"
        try:
            with path.open("ab", buffering=0) as file:
                written = file.write(line)
        except OSError as error:
            raise _cannot_write(path, error) from error
        if written != len(line):
            raise _cannot_write(path, "no space left")

    def start_segment(self, first_step: int) -> None:
        """Close the open segment and start the one after the checkpoint of `first_step`."""
        self.segment = Segment(self._attempt, first_step).folder(self.run_dir)
        """Folder of the open segment."""
        try:
            self.segment.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(self.segment, error) from error


def read_records(run_dir: Path, name: str, *, dropped: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the records of `<name>.jsonl`, without those that a resume dropped.

    Args:
        run_dir: the run's folder.
        name: name of the file; may be a glob pattern (`unreadable-rank-*`).
        dropped: yield those that a resume dropped too.
    """
    return (record for _, record in read_records_after(run_dir, name, START, dropped=dropped))


def read_records_after(
    run_dir: Path, name: str, position: Position, *, dropped: bool = False
) -> Iterator[tuple[Position, dict[str, Any]]]:
    """Yield (position after the record, record) for the complete records after `position`; see `read_records`."""
    for segment, last_step in _segments(run_dir):
        if segment < position[0]:
            continue
        for path in sorted(segment.folder(run_dir).glob(f"{name}.jsonl")):
            for offset, record in _read_lines(path, position[1] if segment == position[0] else 0):
                if dropped or record["step"] <= last_step:
                    yield (segment, offset), record


def live_files(run_dir: Path, pattern: str) -> list[Path]:
    """Return the files of a name in the segments that no resume dropped, in step order."""
    return [
        path
        for segment, last_step in _segments(run_dir)
        if segment.first_step < last_step
        for path in sorted(segment.folder(run_dir).glob(pattern))
    ]


def last_recorded_step(run: str | Path) -> int:
    """Return the step of the newest record of metrics; 0: there is none. A list and a read, without retries.

    Args:
        run: the run's folder, path or URI. A bucket has the log up to the newest checkpoint.

    Raises:
        OSError: the storage failed.
    """
    folder = Folder(str(run), pauses=())
    found = {}
    for name in folder.names(FOLDER):
        parent, _, file = name.rpartition("/")
        match = _SEGMENT.fullmatch(parent.removeprefix(f"{FOLDER}/"))
        if match and file == f"{METRICS}.jsonl":
            found[Segment(*map(int, match.groups()))] = name
    for segment in sorted(found, reverse=True):
        lines = io.BytesIO(folder.read(found[segment]) or b"")
        steps = [record["step"] for _, record in _complete_lines(lines, 0)]
        if steps:
            return int(steps[-1])
    return 0


def next_attempt(run_dir: Path) -> int:
    """Return the number of the attempt that begins, from 1."""
    return max((segment.attempt for segment, _ in _segments(run_dir)), default=0) + 1


def export_records(run_dir: Path) -> None:
    """Copy the records of a finished run into plain files at its top."""
    for name in (METRICS, EVALUATIONS):
        lines = "".join(json.dumps(record) + "\n" for record in read_records(run_dir, name))
        if lines:
            write_file(str(run_dir / f"{name}.jsonl"), lines.encode())


def _segments(run_dir: Path) -> list[tuple[Segment, int]]:
    """Return the segments in the order of writing, each with the last step of it that no later attempt trained again."""
    folder = run_dir / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = sorted(Segment(*map(int, match.groups())) for name in names if (match := _SEGMENT.fullmatch(name)))
    limits: list[tuple[Segment, int]] = []
    limit = sys.maxsize
    for index in range(len(found) - 1, -1, -1):
        limits.append((found[index], limit))
        if index and found[index - 1].attempt < found[index].attempt:  # the first segment of its attempt
            limit = min(limit, found[index].first_step)
    return limits[::-1]


def _read_lines(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset after the line, record), without damaged lines and a last line that a crash tore off."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        lines.seek(offset)
        yield from _complete_lines(lines, offset)


def _complete_lines(lines: Iterable[bytes], offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in lines:
        if line.endswith(b"\n"):
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            yield offset, record


def _cannot_write(path: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written: {why}. The last checkpoint is untouched. Free space or repair the storage, then start "
        f"the run again with its name to resume it"
    )
