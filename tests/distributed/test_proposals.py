"""Two ranks learn one predictor: from the means of both ranks' probes, with equal bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvp_ray.data.dataset import open_dataset
from hvp_ray.distributed.world import World
from hvp_ray.runs.rank import build_order
from hvp_ray.selection import pair_table, selection_at
from hvp_ray.selection.proposals import pair_features, probe_statistics
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.render_batch import build_render_context, render_batch
from hvp_ray.training.step import probe_plans, train_step
from hvp_ray.training.trainee import build_trainee
from tests.distributed.processes import run_ranks
from tests.helpers import tiny_config

pytestmark = pytest.mark.distributed

Arrays = dict[str, NDArray[np.float64]]
CPU = torch.device("cpu")


def _train(rank: int, num_ranks: int, output: str) -> tuple[Arrays, Arrays]:
    """Train 8 steps; return the predictor, and what this rank alone saw of the probe of the last step."""
    selection = {"rule": "predicted", "predictor_delay": 2, "probe_every": 1, "probe_images": 6}
    config = tiny_config(output, selection=selection, data={"num_images": 100}, cluster={"num_trainers": num_ranks})
    dataset = open_dataset(config.data)
    context, copy = build_render_context(config, dataset, "cpu"), CopyToDevice(CPU)
    trainee = build_trainee(config, World(rank=rank, num_ranks=num_ranks), CPU, None)
    trainee.method.train()
    request_of = requests_of_rank(
        config,
        build_order(config, dataset),
        rank=rank,
        num_ranks=num_ranks,
        known_replacements={},
        predictor=trainee.predictor,
    )
    for step in range(8):
        batch, of_step = copy(render_batch(context, request_of(step))), selection_at(config.selection, step, 8)
        probed = probe_plans(trainee, batch, config, of_step)
        train_step(trainee, batch, config, of_step)
    assert trainee.predictor is not None and probed is not None and batch.probe_views is not None
    plan = batch.probe_views.plan
    features = pair_features(plan, batch.heights[:6], batch.widths[:6], pair_table(plan.num_views))
    own = probe_statistics(torch.from_numpy(features), torch.zeros(6, 6))[: len(features) ** 2]
    state = {name: tensor.numpy() for name, tensor in trainee.predictor.state().items()}
    return state, {"own": own.numpy(), "mean": probed.read().numpy()[: len(features) ** 2]}


def test_ranks_learn_from_the_mean_of_their_probes_and_stay_equal(tmp_path: Path) -> None:
    (first, seen_by_first), (second, seen_by_second) = run_ranks(_train, 2, str(tmp_path))
    assert all(np.array_equal(array, second[name]) for name, array in first.items())
    assert first["history"][-1].any()
    assert np.array_equal(seen_by_first["mean"], seen_by_second["mean"])
    assert not np.array_equal(seen_by_first["own"], seen_by_second["own"])
    np.testing.assert_allclose((seen_by_first["own"] + seen_by_second["own"]) / 2, seen_by_first["mean"], rtol=1e-12)
