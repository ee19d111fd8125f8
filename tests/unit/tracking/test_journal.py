"""The journal: complete lines only, truncated on resume."""

from pathlib import Path

import pytest

from hvp_ray.errors import CheckpointError
from hvp_ray.tracking.journal import Journal, read_journal, read_journal_from, truncate_journal


def _write(path: Path, steps: range) -> None:
    journal = Journal(path)
    for step in steps:
        journal.write({"step": step, "metrics": {"train/loss": 0.5 * step}})
    journal.close()


def test_torn_last_line_is_left_out_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 6))
    with path.open("a") as file:
        file.write('{"step": 6, "metr')
    assert [record["step"] for record in read_journal(path)] == [1, 2, 3, 4, 5]
    truncate_journal(path, last_step=3)
    _write(path, range(4, 7))
    assert [record["step"] for record in read_journal(path)] == [1, 2, 3, 4, 5, 6]


def test_reading_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(read_journal_from(path, 0)) == []
    _write(path, range(1, 4))
    *_, (offset, record) = read_journal_from(path, 0)
    assert record["step"] == 3
    _write(path, range(4, 6))
    assert [record["step"] for _, record in read_journal_from(path, offset)] == [4, 5]


def test_what_is_written_behind_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    for torn in ('{"step": 9', "x" * 200_000):
        path.unlink(missing_ok=True)
        _write(path, range(1, 3))
        with path.open("a") as file:
            file.write(torn)
        _write(path, range(3, 5))
        assert [record["step"] for record in read_journal(path)] == [1, 2, 3, 4]
    path.write_text("torn from the start")
    _write(path, range(1, 2))
    assert [record["step"] for record in read_journal(path)] == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_a_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    journal = Journal(path)
    with pytest.raises(CheckpointError, match="cannot be written.*No space left.*make room"):
        journal.write({"step": 1})
    journal.close()
