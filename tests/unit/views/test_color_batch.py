"""Colour, blur and flip of many views at once, against the CPU renderer on the same resized pixels."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch._dynamo.utils import counters

from hvp_ray.config import ViewGroupConfig
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.views.color_batch import (
    Operations,
    PlannedOperations,
    compiled_finish,
    finish_together,
    finish_views,
    largest_blur_radius_px,
    reflected_positions,
)
from hvp_ray.views.plan import draw_plan
from hvp_ray.views.render_cpu import render_view
from tests.helpers import NEUTRAL, groups_of_recipes, photograph_like

CPU = torch.device("cpu")
GROUPS = groups_of_recipes()
NUM_VIEWS, NUM_IMAGES = 4, 16


def _uncropped_plan(group: ViewGroupConfig, num_images: int = NUM_IMAGES) -> ViewPlan:
    """Return a plan whose crops are the whole images, of the size of the views."""
    size = np.full(num_images, group.size_px, np.int32)
    plan = draw_plan(
        seed=0,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=np.arange(num_images),
        image_sizes=(size, size),
        num_views=NUM_VIEWS,
        group=group,
    )
    zeros = np.zeros_like(plan.top)
    return dataclasses.replace(plan, top=zeros, left=zeros, height=zeros + group.size_px, width=zeros + group.size_px)


def _images(generator: np.random.Generator, size_px: int, num_images: int = NUM_IMAGES) -> NDArray[np.uint8]:
    return np.stack([photograph_like(generator, size_px, size_px) for _ in range(num_images)])


def _finished(images: NDArray[np.uint8], plan: ViewPlan, group: ViewGroupConfig) -> NDArray[np.uint8]:
    planned = PlannedOperations.of(plan, group).of_samples(list(range(NUM_VIEWS)), slice(0, len(images)))
    return finish_views(torch.from_numpy(np.concatenate([images] * NUM_VIEWS)), planned).numpy()


def _in_one_batch(images: NDArray[np.uint8], plan: ViewPlan, group: ViewGroupConfig) -> tuple[torch.Tensor, Operations]:
    planned = PlannedOperations.of(plan, group).of_samples(list(range(NUM_VIEWS)), slice(0, len(images)))
    return torch.from_numpy(np.concatenate([images] * NUM_VIEWS)), planned.on(CPU)


def _positions(pixels: torch.Tensor, operations: Operations) -> torch.Tensor:
    return reflected_positions(pixels.shape[1], operations.half_kernels.shape[1] - 1, CPU)


@pytest.mark.parametrize("name", list(GROUPS))
def test_each_chain_equals_the_cpu_renderer_to_one_rounding(generator: np.random.Generator, name: str) -> None:
    group = GROUPS[name]
    images, plan = _images(generator, group.size_px), _uncropped_plan(group)
    expected = [
        render_view(images[i], plan, v, i, group).astype(int) for v in range(NUM_VIEWS) for i in range(NUM_IMAGES)
    ]
    difference = np.abs(_finished(images, plan, group) - np.stack(expected))
    solarized = plan.solarize.reshape(-1)
    assert difference[~solarized].max() <= 1
    assert (difference > 0).mean() < 0.002
    assert (difference > 1).mean() < 1e-4  # a value on the other side of the threshold of solarize


@pytest.mark.parametrize("size_px", [12, 17])
def test_blur_is_reflected_at_the_borders(generator: np.random.Generator, size_px: int) -> None:
    transform = dataclasses.replace(NEUTRAL, blur_probability=1.0, blur_sigma_px=(1.5, 4.0), blur_kernel_px=23)
    group = ViewGroupConfig(size_px=size_px, even=transform)
    images, plan = _images(generator, size_px), _uncropped_plan(group)
    expected = np.stack([render_view(images[i], plan, 2, i, group) for i in range(NUM_IMAGES)]).astype(int)
    finished = _finished(images, plan, group).reshape(NUM_VIEWS, *images.shape)[2]
    assert np.abs(finished - expected).max() <= 1
    assert np.abs(images.astype(int) - expected).max() > 10


def test_operations_that_change_nothing_keep_every_bit(generator: np.random.Generator) -> None:
    """Also where they are computed, as in a batch of views of several kinds."""
    images = torch.from_numpy(_images(generator, 24))
    planned = PlannedOperations.none(len(images), radius_px=4)
    assert torch.equal(finish_views(images, planned), images)
    assert torch.equal(finish_together(images, planned.on(CPU), reflected_positions(24, 4, CPU)), images)


@pytest.mark.parametrize("name", ["simclr-imagenet-r50-100ep", "dino-imagenet-vits16-100ep local"])
def test_all_views_at_once_equal_one_after_another(generator: np.random.Generator, name: str) -> None:
    group = dataclasses.replace(GROUPS[name], size_px=40)
    images, plan = _images(generator, 40), _uncropped_plan(group)
    pixels, operations = _in_one_batch(images, plan, group)
    together = finish_together(pixels, operations, _positions(pixels, operations)).numpy().astype(int)
    difference = np.abs(together - _finished(images, plan, group))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


@pytest.mark.parametrize("size_px", [40, 72])  # torch sums small and large views in other ways
def test_compiled_graph_has_few_kernels_and_serves_any_number_of_views(
    generator: np.random.Generator, size_px: int
) -> None:
    """What runs on a GPU, compiled for this CPU. A graph break or a compilation for each batch would cost seconds."""
    from torch._inductor import metrics

    group = dataclasses.replace(GROUPS["simclr-imagenet-r50-100ep"], size_px=size_px)
    torch.compiler.reset()
    metrics.reset()
    counters.clear()
    compiled = compiled_finish(CPU, size_px, largest_blur_radius_px(group))
    assert compiled is not finish_together, "torch.compile needs a C++ compiler"
    num_kernels = metrics.generated_kernel_count + counters["inductor"]["extern_calls"]
    for num_images in (16, 3):
        images, plan = _images(generator, size_px, num_images), _uncropped_plan(group, num_images)
        pixels, operations = _in_one_batch(images, plan, group)
        positions = _positions(pixels, operations)
        finished = compiled(pixels, operations, positions)
        difference = np.abs(finished.numpy().astype(int) - finish_together(pixels, operations, positions).numpy())
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001
        for some in (slice(3, 8), slice(5, 7)):  # bits do not depend on the batch
            few = compiled(pixels[some], Operations(*(of_all[some] for of_all in operations)), positions)
            assert torch.equal(few, finished[some])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert 0 < num_kernels <= 20, num_kernels
