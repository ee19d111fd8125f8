"""The log of a run: whole segments drop out at a resume, nothing is rewritten, and torn lines are left out."""

from pathlib import Path

import numpy as np
import pytest

from hvp_ray.errors import CheckpointError
from hvp_ray.tracking.run_log import (
    ATTEMPTS,
    EVALUATIONS,
    METRICS,
    START,
    RunLog,
    export_records,
    last_recorded_step,
    live_files,
    next_attempt,
    read_records,
    read_records_after,
)


def _write(log: RunLog, steps: range) -> None:
    for step in steps:
        log.write(METRICS, {"step": step, "metrics": {"train/loss": 0.5 * step}})


def _steps(run_dir: Path, name: str = METRICS) -> list[int]:
    return [record["step"] for record in read_records(run_dir, name)]


def _contents(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_resume_drops_the_segments_after_its_checkpoint_and_rewrites_nothing(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    _write(first, range(1, 5))
    first.start_segment(4)
    _write(first, range(5, 8))
    with (first.segment / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "metr')  # the process dies
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert last_recorded_step(tmp_path) == 7
    before = _contents(tmp_path)
    second = RunLog(tmp_path, attempt=next_attempt(tmp_path), first_step=4)
    assert _steps(tmp_path) == [1, 2, 3, 4]
    _write(second, range(5, 7))
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert last_recorded_step(tmp_path) == 6
    assert {path: content for path, content in _contents(tmp_path).items() if path in before} == before


@pytest.mark.parametrize("seed", range(20))
def test_records_after_any_kills_are_those_of_a_run_that_was_never_killed(seed: int, tmp_path: Path) -> None:
    """Checkpoints every 5 steps; an attempt dies anywhere, also between a closed segment and its commit."""
    generator = np.random.default_rng(seed)
    committed = [0]
    while committed[-1] < 30:
        start = committed[-1 - int(generator.integers(0, min(2, len(committed))))]  # the newest may be damaged
        committed = [step for step in committed if step <= start]
        log = RunLog(tmp_path, attempt=next_attempt(tmp_path), first_step=start)
        log.write(ATTEMPTS, {"step": start})
        dies_at = start + int(generator.integers(1, 25))
        for step in range(start + 1, min(dies_at, 30) + 1):
            _write(log, range(step, step + 1))
            if step % 5 == 0:
                (log.segment / f"selection-{step:08d}.parquet").touch()
                log.start_segment(step)
                if step == dies_at and generator.random() < 0.5:
                    break
                committed.append(step)
    assert _steps(tmp_path) == list(range(1, 31))
    names = [path.name for path in live_files(tmp_path, "selection-*.parquet")]
    assert names == [f"selection-{step:08d}.parquet" for step in range(5, 31, 5)]
    starts = [record["step"] for record in read_records(tmp_path, ATTEMPTS, dropped=True)]
    assert len(starts) == next_attempt(tmp_path) - 1
    export_records(tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 30


def test_attempt_that_is_not_quite_dead_does_no_harm(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    _write(first, range(1, 5))
    first.start_segment(4)
    second = RunLog(tmp_path, attempt=2, first_step=4)
    _write(second, range(5, 7))
    _write(first, range(5, 9))
    first.start_segment(8)
    _write(first, range(9, 13))
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_answer_that_came_after_its_step_outlives_the_segment_it_stands_in(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.start_segment(4)
    for step in (2, 6):
        log.write(EVALUATIONS, {"step": step})
    RunLog(tmp_path, attempt=2, first_step=4)
    assert _steps(tmp_path, EVALUATIONS) == [2]


def test_reading_continues_where_it_stopped(tmp_path: Path) -> None:
    assert list(read_records_after(tmp_path, METRICS, START)) == []
    log = RunLog(tmp_path)
    _write(log, range(1, 4))
    *_, (position, record) = read_records_after(tmp_path, METRICS, START)
    assert record["step"] == 3
    _write(log, range(4, 5))
    log.start_segment(4)
    _write(log, range(5, 6))
    assert [record["step"] for _, record in read_records_after(tmp_path, METRICS, position)] == [4, 5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_a_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    (log.segment / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="cannot be written.*No space left.*Free space"):
        log.write(METRICS, {"step": 1})


def test_a_damaged_line_costs_one_record_and_not_the_run(tmp_path: Path) -> None:
    """A machine that loses power may leave bytes of no record in the middle of a file."""
    log = RunLog(tmp_path)
    log.write(METRICS, {"step": 1})
    with (log.segment / f"{METRICS}.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "met\0\0\0\n\xff\0\n')
    log.write(METRICS, {"step": 3})
    assert [record["step"] for record in read_records(tmp_path, METRICS)] == [1, 3]
    assert last_recorded_step(tmp_path) == 3
