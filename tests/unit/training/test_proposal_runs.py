"""Runs with rule predicted: the same bits whatever is prefetched, killed and resumed, and what the probes cost."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.distributed.world import World
from hvp_ray.errors import ConfigError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.checkpoint import CheckpointStore, weights_digest
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.rank import build_order
from hvp_ray.selection import selection_at
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.render_batch import build_render_context, render_batch
from hvp_ray.tracking.run_log import METRICS, read_records
from hvp_ray.training.step import StepMetrics, train_step
from hvp_ray.training.trainee import build_trainee, take_checkpoint
from tests.helpers import tiny_config

CPU = torch.device("cpu")
DELAY = 5


def _config(output: Path, *, recipe: str = "simsiam-digits", **selection: object) -> RunConfig:
    """12 steps; every second one probes."""
    values = {"rule": "predicted", "predictor_delay": DELAY, "probe_every": 2, "num_plans": 8} | selection
    return tiny_config(
        str(output),
        recipe=recipe,
        selection=values,
        data={"num_images": 100},
        training={"num_steps": 12},
        tracking={"knn_images": 0},
    )


def _vanilla(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, selection=config.selection.with_rule("first"))


def _train(config: RunConfig, *, in_flight: int, resumed_at: int | None = None) -> tuple[str, list[StepMetrics]]:
    """Train 12 steps with batches requested ahead as `ViewStream` does; return the digest of weights and metrics."""
    dataset = open_dataset(config.data)
    context, order, copy = build_render_context(config, dataset, "cpu"), build_order(config, dataset), CopyToDevice(CPU)
    checkpoint, metrics = None, []
    for steps in [range(12)] if resumed_at is None else [range(resumed_at), range(resumed_at, 12)]:
        trainee = build_trainee(config, World(), CPU, checkpoint)
        trainee.method.train()
        request_of = requests_of_rank(
            config,
            order,
            rank=0,
            num_ranks=1,
            known_replacements={},
            predictor=trainee.predictor,
        )
        requests = {step: request_of(step) for step in range(steps.start, steps.start + in_flight)}
        for step in steps:
            requests[step + in_flight] = request_of(step + in_flight)
            of_step = selection_at(config.selection, step, num_steps=12)
            render_batch(context, requests[step])  # a worker died after it
            metrics.append(train_step(trainee, copy(render_batch(context, requests.pop(step))), config, of_step))
        checkpoint = take_checkpoint(trainee, steps.stop)
    assert checkpoint is not None
    return weights_digest(checkpoint.method | checkpoint.predictor), metrics


def test_weights_and_predictor_depend_neither_on_batches_in_flight_nor_on_when_a_run_is_resumed(tmp_path: Path) -> None:
    config = _config(tmp_path)
    digest, metrics = _train(config, in_flight=0)
    assert [m.measurements["selection/predictor_r2"] != 0 for m in metrics[:4]] == [False, False, True, True]
    assert _train(config, in_flight=DELAY - 1)[0] == digest
    for resumed_at in (3, 8):  # after a probe that is not used yet, and after a step without one
        assert _train(config, in_flight=DELAY - 1, resumed_at=resumed_at)[0] == digest
    other = dataclasses.replace(config, selection=dataclasses.replace(config.selection, predictor_delay=DELAY + 1))
    assert _train(other, in_flight=0)[0] != digest


@pytest.mark.parametrize("recipe", ["simsiam-digits", "simclr-digits", "dino-digits", "ibot-digits"])
def test_run_with_proposals_resumes_to_the_same_bits(tmp_path: Path, recipe: str) -> None:
    def digest(name: str) -> str:
        config = _config(tmp_path, recipe=recipe)
        summary = pretrain_in_process(dataclasses.replace(config, run=dataclasses.replace(config.run, name=name)))
        assert summary is not None
        return str(summary["weights_digest"])

    straight = digest("straight")
    digest("resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000012")
    (tmp_path / "resumed" / "summary.json").unlink()
    assert digest("resumed") == straight
    r2 = [
        [record["metrics"]["selection/predictor_r2"] for record in read_records(tmp_path / name, METRICS)]
        for name in ("straight", "resumed")
    ]
    assert len(r2[0]) == 12
    assert r2[0] == r2[1]


def test_first_steps_are_vanilla_and_later_ones_render_two_views_of_other_plans(tmp_path: Path) -> None:
    config = _config(tmp_path)
    for name, run in (("predicted", config), ("vanilla", _vanilla(config))):
        run = dataclasses.replace(run, run=dataclasses.replace(run.run, name=name))
        assert pretrain_in_process(run) is not None
    losses = [
        [record["metrics"]["train/loss"] for record in read_records(tmp_path / name, METRICS)]
        for name in ("predicted", "vanilla")
    ]
    # The probe of step 0 is used first in step `DELAY`.
    assert np.equal(*losses).tolist() == [True] * DELAY + [False] * (12 - DELAY)


def test_probe_changes_nothing_but_the_predictor(tmp_path: Path) -> None:
    """Running statistics, gradients and drop path included: with a delay beyond the run all steps are vanilla."""
    for recipe in ("simsiam-digits", "ibot-digits"):
        config, digests = _config(tmp_path, recipe=recipe, predictor_delay=30), []
        for run in (config, _vanilla(config)):
            summary = pretrain_in_process(run)
            assert summary is not None
            digests.append(summary["weights_digest"])
        assert digests[0] == digests[1]


def test_checkpoint_holds_the_predictor(tmp_path: Path) -> None:
    config = _config(tmp_path)
    trainee = build_trainee(config, World(), CPU, None)
    assert trainee.predictor is not None
    trainee.predictor.end_step(np.linspace(1.0, 2.0, 932))
    store = CheckpointStore(str(tmp_path / "checkpoints"), run_identity="x", keep=1)
    store.write(take_checkpoint(trainee, 1))
    loaded = store.load_newest()
    assert loaded is not None
    expected = trainee.predictor.state()
    assert loaded.predictor.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.predictor.items())
    assert expected["history"].shape == (DELAY, 30)


def test_delay_must_exceed_the_batches_in_flight(tmp_path: Path) -> None:
    config = _config(tmp_path)
    for in_flight in (DELAY - 1, DELAY):
        resolved = dataclasses.replace(resolve_inline(config.cluster), batches_in_flight=in_flight)
        if in_flight < DELAY:
            prepare_run(config, resolved)
            continue
        with pytest.raises(
            ConfigError, match="more than the 5 batches.*cluster.batches_in_flight=4 or less, or a longer"
        ):
            prepare_run(config, resolved)


def test_more_probe_images_than_a_trainer_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="selection.probe_images=17.*at most the 16 images of a trainer"):
        _config(tmp_path, probe_images=17)
