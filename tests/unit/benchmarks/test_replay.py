"""Replay of score matrices: hardness by hand, what each knob must and must not keep, and the run's own choices."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.hardness import replay_run
from benchmarks.replay.figure import draw_hardness
from benchmarks.replay.kept import KeptScale
from benchmarks.replay.knobs import replay
from benchmarks.replay.predicted import chosen_by_predictor
from benchmarks.replay.scores import LoggedScores
from hvp_ray.config import TransformConfig, ViewGroupConfig
from hvp_ray.costs.operations import count_operations
from hvp_ray.errors import DataError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.randomness import Purpose
from hvp_ray.selection import Candidates, CandidateScores
from hvp_ray.tracking.logged_pairs import read_selection_log
from hvp_ray.views.geometry import crop_iou
from hvp_ray.views.plan import draw_plan
from tests.helpers import tiny_config

IMAGES_PER_STEP = 40


def _logged(scores: CandidateScores, candidates: Candidates) -> LoggedScores:
    """Return scores as if they were logged, `IMAGES_PER_STEP` images a step."""
    count = len(scores.pairs_BP)
    sizes = (np.full(count, 375, np.int32), np.full(count, 500, np.int32))
    plan = draw_plan(
        seed=0,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=np.arange(count),
        image_sizes=sizes,
        num_views=candidates.num_views,
        group=ViewGroupConfig(size_px=32, even=TransformConfig()),
    )
    return LoggedScores(
        seed=0,
        step_N=1 + np.arange(count) // IMAGES_PER_STEP,
        epoch_N=np.zeros(count, np.int32),
        sample_id_N=np.arange(count),
        image_sizes=sizes,
        plan=plan,
        candidates=candidates,
        scores=scores,
    )


def _random(candidates: Candidates, count: int, generator: np.random.Generator) -> LoggedScores:
    shape = (count, len(candidates.pairs))
    of_locals = None
    if candidates.num_local_views:
        of_locals = torch.from_numpy(generator.normal(size=(*shape, candidates.num_local_views)).astype(np.float32))
    pairs = torch.from_numpy(generator.normal(size=shape).astype(np.float32))
    return _logged(CandidateScores(pairs_BP=pairs, locals_BPL=of_locals), candidates)


def _kept(logged: LoggedScores, chosen_N: NDArray[np.float64]) -> float:
    scale = KeptScale(step_N=logged.step_N, mean_N=logged.mean(), hardest_N=logged.chosen_by("hardest"))
    return scale.of(chosen_N).kept


def test_two_images_by_hand() -> None:
    """Means 3 and 2, hardest 6 and 3: hardness of 3 + 1 can be kept."""
    pairs = torch.tensor([[1.0, 2.0, 6.0], [0.0, 3.0, 3.0]])
    logged = _logged(CandidateScores(pairs_BP=pairs), Candidates(num_views=3))
    assert _kept(logged, np.array([6.0, 3.0])) == 1.0
    assert _kept(logged, np.array([2.0, 3.0])) == 0.0
    assert _kept(logged, np.array([6.0, 0.0])) == 0.25
    assert logged.of_first_views(2).chosen_by("hardest").tolist() == [1.0, 0.0]
    assert logged.chosen_by("easiest").tolist() == [1.0, 0.0]


def test_local_views_by_hand() -> None:
    """Two of three local views: 10 and 20 with the additions 1, 2, 4 and 0, 0, 3."""
    scores = CandidateScores(
        pairs_BP=torch.tensor([[10.0, 20.0, 0.0]]), locals_BPL=torch.tensor([[[1.0, 2, 4], [0, 0, 3], [0, 0, 0]]])
    )
    logged = _logged(scores, Candidates(num_views=3, num_local_views=3, num_chosen_local_views=2))
    assert logged.chosen_by("hardest").tolist() == [23.0]
    assert logged.chosen_by("first").tolist() == logged.of_pairs(np.array([0])).tolist() == [13.0]
    assert logged.of_first_views(2).chosen_by("hardest").tolist() == [16.0]
    assert logged.mean() == pytest.approx([(10 + 20 + 0) / 3 + 2 * (7 / 3 + 1 + 0) / 3])


def test_interval_covers_what_chance_gives_and_thirds_part_the_steps(generator: np.random.Generator) -> None:
    logged = _random(Candidates(num_views=4), 3000, generator)
    scale = KeptScale(step_N=logged.step_N, mean_N=logged.mean(), hardest_N=logged.chosen_by("hardest"))
    kept = scale.of(logged.chosen_by("random"))
    assert kept.low < kept.kept < kept.high
    assert kept.low - 0.03 < 0.0 < kept.high + 0.03
    half = np.where(logged.step_N <= 25, scale.hardest_N, scale.mean_N)
    assert [scale.of(half, third).kept for third in scale.thirds().values()] == pytest.approx([1.0, 0.0, 0.0])


@pytest.mark.parametrize("num_local_views", [0, 8])
def test_more_candidates_are_never_easier(num_local_views: int, generator: np.random.Generator) -> None:
    """Views and limits are nested, image by image; quantiles are ordered, and 1 keeps all."""
    candidates = Candidates(num_views=5, num_local_views=num_local_views, num_chosen_local_views=num_local_views // 2)
    logged = _random(candidates, 200, generator)
    hardest = logged.chosen_by("hardest")
    nested = [
        [logged.of_first_views(views).chosen_by("hardest") for views in (2, 3, 4, 5)],
        [logged.chosen_by("hardest", limit=limit) for limit in (1, 2, 4, 8)] + [hardest],
        [logged.chosen_by("hardest", quantile=quantile) for quantile in (0.0, 0.3, 0.5, 0.8, 1.0)],
    ]
    for chosen in nested:
        assert (np.diff(chosen, axis=0) >= 0).all()
        assert _kept(logged, chosen[0]) < _kept(logged, chosen[1]) < _kept(logged, chosen[-1]) == 1.0


def test_predictor_keeps_what_the_plan_explains_and_nothing_of_shuffled_scores(
    generator: np.random.Generator,
) -> None:
    candidates = Candidates(num_views=6)
    logged = _random(candidates, 4000, generator)
    plan = logged.plan
    ious = crop_iou(plan.top, plan.left, plan.height, plan.width, candidates.pairs).astype(np.float32)

    def kept(scores: NDArray[np.float32]) -> float:
        known = dataclasses.replace(logged, scores=CandidateScores(pairs_BP=torch.from_numpy(scores)))
        chosen_N = chosen_by_predictor(known, num_probe_views=4, probe_images=16, probe_every=4)
        return _kept(known, chosen_N)

    explained = -ious + 0.02 * generator.normal(size=ious.shape).astype(np.float32)
    assert kept(explained) > 0.9  # all but the first steps, which are vanilla
    assert abs(kept(generator.permuted(explained, axis=1))) < 0.05


def test_all_settings_of_a_run_without_local_views(generator: np.random.Generator, tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), "simclr-digits", training={"images_per_step": IMAGES_PER_STEP})
    logged = _random(Candidates(num_views=5), 2000, generator)
    among = logged.of_first_views(4)
    settings = list(replay(logged, config, num_views=4))
    assert len({(setting.knob, setting.value) for setting in settings}) == len(settings)
    found = {(setting.knob, setting.value): (setting.price, _kept(among, setting.chosen_N)) for setting in settings}
    full = found["views", "4"][0]
    assert full == count_operations(config).ratio
    assert found["views", "4"][1] == found["top_k", "1"][1] == 1.0 < found["views", "5"][1]
    assert found["softmax", "2"][1] < found["softmax", "0.5"][1] < 1.0
    assert found["share", "0.25"] == pytest.approx((1 + 0.25 * (full - 1), 0.25), abs=0.02)
    assert found["every", "2"] == pytest.approx((1 + 0.5 * (full - 1), 0.5), abs=0.02)
    rescues = [found["rescue", share] for share in ("0.1", "0.25", "0.5", "0.75")]
    assert all(0.0 < first[1] < second[1] < 1.0 for first, second in itertools.pairwise(rescues))
    two = 1 + (full - 1) / 2  # scoring costs alike for each view, nearly
    assert rescues[2][0] == pytest.approx((two + full) / 2, rel=0.01)
    probes = 16 / IMAGES_PER_STEP / 4 * (full - 1)
    assert found["plans", "4"][0] == found["plans", "5"][0] == pytest.approx(1 + probes, rel=0.01)
    for unscored in ("random", "min_iou"):
        assert found[unscored, ""] == pytest.approx((1.0, 0.0), abs=0.06)


def test_replay_makes_the_choices_of_the_run(tmp_path: Path) -> None:
    """With local views, and with a limit, whose candidates are drawn anew."""
    selection = {"num_local_views": 6, "num_chosen_local_views": 2}
    config = tiny_config(
        str(tmp_path), "dino-digits", run={"name": "dino"}, training={"num_steps": 3}, selection=selection
    )
    pretrain_in_process(config)
    log = read_selection_log(tmp_path / "dino")
    np.testing.assert_allclose(LoggedScores.of_log(log, config).chosen_by("hardest"), log["scores"].max(axis=1), 1e-5)

    limited = tiny_config(
        str(tmp_path), run={"name": "limited"}, training={"num_steps": 2}, selection={"num_views": 6, "limit": 4}
    )
    pretrain_in_process(limited)
    log = read_selection_log(tmp_path / "limited")
    chosen = log["scores"][np.arange(log.num_images), log["chosen_pair"]]
    assert (chosen < log["scores"].max(axis=1)).any()
    replayed = LoggedScores.of_log(log, limited)
    np.testing.assert_array_equal(replayed.chosen_by("hardest", limit=4), chosen)

    with pytest.raises(DataError, match="2 logged steps"):
        next(replay_run(tmp_path / "limited", 4))
    results = list(replay_run(tmp_path / "dino", 4))
    assert {"limit", "views", "plans"} <= {result["knob"] for result in results}
    assert json.loads(json.dumps(results)) == results
    draw_hardness(tmp_path / "hardness.png", {"dino": results, "again": results})
    assert (tmp_path / "hardness.png").stat().st_size > 10_000


def test_a_log_without_scores_is_refused(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), run={"name": "r"}, training={"num_steps": 1}, selection={"rule": "random"})
    pretrain_in_process(config)
    with pytest.raises(DataError, match=r"selection\.score_always=true"):
        LoggedScores.of_log(read_selection_log(tmp_path / "r"), config)
