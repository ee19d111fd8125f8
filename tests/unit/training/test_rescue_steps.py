"""Steps with rescue: they end where full scoring or one pair would, in parts too, and a replay makes the same choices."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.replay.knobs import rescues
from benchmarks.replay.prices import Prices
from benchmarks.replay.scores import LoggedScores, score_of
from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.distributed.world import World
from hvp_ray.methods.method import StepPosition
from hvp_ray.recipes import get_recipe
from hvp_ray.runs.rank import build_order
from hvp_ray.selection import hard_step
from hvp_ray.stream.batches import InlineBatches, requests_of_rank
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.render_batch import build_render_context
from hvp_ray.tracking.selection_metrics import describe_scores
from hvp_ray.training.step import StepMetrics, train_step
from hvp_ray.training.trainee import build_trainee
from tests.helpers import tiny_config

CPU = torch.device("cpu")
MULTI_CROP = ("dino-digits", "ibot-digits")
RECIPES = ("simsiam-digits", "simclr-digits", *MULTI_CROP)
VIT = dataclasses.replace(get_recipe("ibot-digits").method.backbone, dim=16, depth=2, num_heads=2, drop_path=0.0)


def _config(output: Path, recipe: str, *, parts: int = 1, **selection: Any) -> RunConfig:
    """Return a run whose scoring does not depend on the other images of a batch (SimCLR's negatives aside)."""
    config = tiny_config(
        str(output),
        recipe=recipe,
        selection={"scoring_batch_norm": "running"} | selection,
        method={"backbone": VIT},
        data={"num_images": 60},
        training={"accumulation_steps": parts},
    )
    if recipe not in MULTI_CROP:
        return config
    local = dataclasses.replace(config.views.local_views, size_px=4)
    return dataclasses.replace(config, views=dataclasses.replace(config.views, local_views=local))


def _batches(config: RunConfig, count: int) -> list[DeviceBatch]:
    dataset = open_dataset(config.data)
    context = build_render_context(config, dataset, "cpu")
    requests = requests_of_rank(config, build_order(config, dataset), rank=0, num_ranks=1, known_replacements={})
    stream = InlineBatches(context, requests, first_step=0, copy_to_device=CopyToDevice(CPU))
    return [stream.next_batch() for _ in range(count)]


def _train(config: RunConfig, count: int = 3) -> tuple[dict[str, Tensor], list[StepMetrics]]:
    trainee = build_trainee(config, World(), CPU, None)
    trainee.method.train()
    metrics = []
    for step, batch in enumerate(_batches(config, count)):
        trainee.method.begin_step(StepPosition(step=step, num_steps=3, steps_per_epoch=3))
        metrics.append(train_step(trainee, batch, config, hard_step(config.selection)))
    return trainee.method.state_dict(), metrics


def _are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_share_of_one_trains_as_hardest_and_share_of_zero_as_two_views_to_the_bit(tmp_path: Path, recipe: str) -> None:
    """0.99 of 16 images are all of them, in two rounds."""
    views = "num_global_views" if recipe in MULTI_CROP else "num_views"
    hardest, everything, half, nothing, two = (
        _train(_config(tmp_path, recipe, **selection))[0]
        for selection in ({}, {"rescue_share": 0.99}, {"rescue_share": 0.5}, {"rescue_share": 0.0}, {views: 2})
    )
    assert _are_equal(everything, hardest)
    assert _are_equal(nothing, two)
    assert not _are_equal(half, hardest)
    assert not _are_equal(half, two)


@pytest.mark.parametrize("recipe", MULTI_CROP)
def test_teachers_outputs_are_reused_without_changing_a_bit(tmp_path: Path, recipe: str) -> None:
    states = [
        _train(_config(tmp_path, recipe, rescue_share=0.5, reuse_teacher=reuse_teacher))[0]
        for reuse_teacher in (True, False)
    ]
    assert _are_equal(*states)


@pytest.mark.parametrize("recipe", ["simsiam-digits", "ibot-digits"])
def test_each_part_of_a_step_rescues_its_own_easiest(tmp_path: Path, recipe: str) -> None:
    config = _config(tmp_path, recipe, parts=2, rescue_share=0.5)
    full = _train(dataclasses.replace(config, selection=dataclasses.replace(config.selection, rescue_share=1.0)), 1)[1]
    scores, all_scores = _train(config, 1)[1][0].scores, full[0].scores
    assert scores is not None and all_scores is not None
    first_pair = all_scores.best_of_pairs(config.selection.num_chosen_local_views or 0)[:, 0]
    for start in (0, 8):
        rescued = start + first_pair[start : start + 8].argsort()[:4]
        assert sorted(rescued.tolist()) == [i for i in range(start, start + 8) if scores.is_scored_BP[i].all()]
    torch.testing.assert_close(scores.pairs_BP[scores.is_scored_BP], all_scores.pairs_BP[scores.is_scored_BP])


@pytest.mark.parametrize("recipe", ["simsiam-digits", "ibot-digits"])
def test_replay_of_a_step_with_all_scores_makes_the_choices_of_a_step_with_rescue(tmp_path: Path, recipe: str) -> None:
    """Both start from the same weights; SimCLR's scores are not those of a full batch."""
    config = _config(tmp_path, recipe)
    batch = _batches(config, 1)[0]
    full = _train(config, 1)[1][0].scores
    assert full is not None
    candidates = hard_step(config.selection).candidates(config.views)
    logged = LoggedScores(
        seed=config.run.seed,
        step_N=np.ones(16, np.int64),
        epoch_N=np.zeros(16, np.int32),
        sample_id_N=batch.sample_ids,
        image_sizes=(batch.heights, batch.widths),
        plan=batch.global_views.plan,
        candidates=candidates,
        scores=full,
    )
    replayed = {setting.value: setting for setting in rescues(logged, Prices(config), logged.chosen_by("hardest"))}
    for share in (0.25, 0.5, 0.75):
        trained = _train(_config(tmp_path, recipe, rescue_share=share), 1)[1][0]
        assert trained.scores is not None and trained.selection.scores is not None
        chosen_N = replayed[f"{share:g}"].chosen_N
        np.testing.assert_allclose(trained.selection.scores.numpy(), chosen_N, rtol=1e-5)
        np.testing.assert_allclose(score_of(trained.scores, trained.selection).numpy(), chosen_N, rtol=1e-5)


def test_metrics_leave_out_what_was_not_scored(tmp_path: Path) -> None:
    """Of 8 rescued images all 6 pairs count, and of the others none but the chosen one."""
    metrics = _train(_config(tmp_path, "simsiam-digits", rescue_share=0.5), 1)[1][0]
    scores, selection = metrics.scores, metrics.selection
    assert scores is not None and selection.pair_indices is not None
    rescued = scores.is_scored_BP.all(dim=1)
    others = [
        float(score)
        for image in rescued.nonzero().flatten().tolist()
        for pair, score in enumerate(scores.pairs_BP[image])
        if pair != selection.pair_indices[image]
    ]
    assert len(others) == 8 * 5
    described = describe_scores(scores, selection, metrics.candidates)
    assert described["selection/other_score"] == pytest.approx(np.mean(others))
    assert described["selection/chosen_score"] == pytest.approx(float(scores.pairs_BP.max(dim=1).values.mean()))
    nothing = _train(_config(tmp_path, "simsiam-digits", rescue_share=0.0), 1)[1][0]
    assert nothing.scores is not None
    assert describe_scores(nothing.scores, nothing.selection, nothing.candidates).keys() == {"selection/chosen_score"}
