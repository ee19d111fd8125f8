"""What the log of choices gives back, and that a resumed run leaves no step out and none twice."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import DataError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.records import ViewBatch
from hvp_ray.runs.rank import build_order
from hvp_ray.selection import Candidates
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.render_batch import build_render_context, render_batch
from hvp_ray.tracking.logged_pairs import read_selection_log
from hvp_ray.tracking.run_log import RunLog, next_attempt
from hvp_ray.tracking.selection_analysis import analyse_selection
from hvp_ray.tracking.selection_log import PLAN_COLUMNS, SelectionLogWriter, selection_files
from tests.helpers import tiny_config

PAIRS = Candidates(num_views=4).pairs


def _batches(config, count: int) -> list[ViewBatch]:  # type: ignore[no-untyped-def]
    dataset = open_dataset(config.data)
    context = build_render_context(config, dataset, "cpu")
    request_of = requests_of_rank(config, build_order(config, dataset), rank=0, num_ranks=1, known_replacements={})
    return [render_batch(context, request_of(step)) for step in range(count)]


def _choice(step: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    generator = np.random.default_rng(step)
    scores = generator.normal(size=(count, len(PAIRS))).astype(np.float32)
    return scores.argmax(axis=1), scores


def _log(folder: Path, first_step: int = 0) -> RunLog:
    return RunLog(folder, attempt=next_attempt(folder), first_step=first_step)


def _writer(log: RunLog, **tracking: int) -> SelectionLogWriter:
    config = tiny_config(str(log.run_dir), tracking=dict(tracking))
    return SelectionLogWriter(log, config, run_name="one", steps_per_epoch=10)


def test_plans_scores_and_choices_come_back_as_they_were(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path))
    writer = _writer(_log(tmp_path))
    batches = _batches(config, 3)
    for step, batch in enumerate(batches, start=1):
        chosen, scores = _choice(step, len(batch.sample_ids))
        writer.take(step, batch, pairs=PAIRS, chosen=chosen, scores=scores if step < 3 else None)
    writer.flush()
    log = read_selection_log(tmp_path)
    assert log.num_images == 3 * 16
    plan = batches[1].global_views.plan
    rows = slice(16, 32)
    for name in PLAN_COLUMNS:
        np.testing.assert_array_equal(log[name][rows], getattr(plan, name).T, err_msg=name)
    np.testing.assert_array_equal(log["chosen_pair"][rows], _choice(2, 16)[0])
    np.testing.assert_array_equal(log["scores"][rows], _choice(2, 16)[1])
    assert np.isnan(log["scores"][32:]).all()


def test_scores_of_local_views_come_back_for_each_pair(tmp_path: Path) -> None:
    """With DINO's local views; a step that did not score has none. Without local views the log has no such column."""
    config = tiny_config(str(tmp_path), "dino-digits")
    writer = SelectionLogWriter(_log(tmp_path), config, run_name="one", steps_per_epoch=10)
    locals_BPL = np.random.default_rng(0).normal(size=(16, len(PAIRS), 4)).astype(np.float32)
    for step, batch in enumerate(_batches(config, 2), start=1):
        chosen, scores = _choice(step, 16)
        of_step = {"scores": scores, "local_scores": locals_BPL} if step == 2 else {"scores": None}
        writer.take(step, batch, pairs=PAIRS, chosen=chosen, **of_step)
    writer.flush()
    logged = read_selection_log(tmp_path).local_scores
    assert logged is not None
    assert np.isnan(logged[:16]).all()
    np.testing.assert_array_equal(logged[16:], locals_BPL)

    pretrain_in_process(tiny_config(str(tmp_path), run={"name": "pairs"}, training={"num_steps": 1}))
    assert read_selection_log(tmp_path / "pairs").local_scores is None


def test_resumed_run_writes_the_same_log(tmp_path: Path) -> None:
    """Checkpoints of steps 4 and 7, of which the second was damaged: resumed from that of step 4."""
    batches = _batches(tiny_config(str(tmp_path)), 9)

    def take(log: RunLog, steps: range, checkpoints: set[int]) -> None:
        writer = _writer(log)
        for step in steps:
            chosen, scores = _choice(step, 16)
            writer.take(step, batches[step - 1], pairs=PAIRS, chosen=chosen, scores=scores)
            if step in checkpoints:
                writer.flush()
                log.start_segment(step)

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    take(_log(straight), range(1, 10), {4, 9})
    take(_log(resumed), range(1, 9), {4, 7})
    take(_log(resumed, 4), range(5, 10), {9})
    first, second = read_selection_log(straight), read_selection_log(resumed)
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert np.all(a == b) if isinstance(a, np.ndarray) else a == b, field.name


@pytest.mark.parametrize(
    ("images", "expected"), [(0, []), (16, [1, 11]), (32, [1, 6, 11, 16]), (10**6, list(range(1, 21)))]
)
def test_logged_steps_are_spread_over_the_epoch(tmp_path: Path, images: int, expected: list[int]) -> None:
    writer = _writer(_log(tmp_path), selection_images_per_epoch=images)
    assert [step for step in range(1, 21) if writer.wants(step)] == expected


def test_a_run_logs_its_hard_choices_and_a_vanilla_run_nothing(tmp_path: Path) -> None:
    summary = pretrain_in_process(tiny_config(str(tmp_path), run={"name": "hard"}, training={"num_steps": 4}))
    assert summary is not None
    log = read_selection_log(tmp_path / "hard")
    assert np.unique(log["step"]).tolist() == [1, 2, 3, 4]
    # The rule is "hardest", so the chosen pair is that of the largest score, in every row.
    np.testing.assert_array_equal(log["scores"].argmax(axis=1), log["chosen_pair"])
    pretrain_in_process(
        tiny_config(str(tmp_path), run={"name": "vanilla"}, training={"num_steps": 2}, selection={"rule": "first"})
    )
    assert not selection_files(tmp_path / "vanilla")


def test_random_steps_that_are_logged_for_their_scores_are_no_choices(tmp_path: Path) -> None:
    late = {"rule": "hardest", "score_always": True, "start_fraction": 0.5}
    pretrain_in_process(tiny_config(str(tmp_path), run={"name": "late"}, training={"num_steps": 8}, selection=late))
    log = read_selection_log(tmp_path / "late")
    assert np.unique(log["step"]).tolist() == list(range(1, 9)) and np.isfinite(log["scores"]).all()
    assert np.unique(log["step"][log["has_choice"]]).tolist() == [5, 6, 7, 8]
    period = analyse_selection(log).whole_run
    assert (period.first_step, period.last_step, period.num_images) == (5, 8, 4 * 16)
    with pytest.raises(DataError, match="logged random steps only"):
        analyse_selection(log.take(np.flatnonzero(log["step"] <= 4)))
    # A run on random views whose candidates are scored is analysed, as a control.
    scored = {"rule": "first", "score_always": True}
    pretrain_in_process(tiny_config(str(tmp_path), run={"name": "first"}, training={"num_steps": 2}, selection=scored))
    assert read_selection_log(tmp_path / "first")["has_choice"].all()
