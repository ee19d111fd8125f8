"""DALI (its CPU backend, the twin of the GPU's graph) against the CPU renderer. Units: uint8 levels.

Bands: mean 0.5 (0.8 for views below 16 px), at most 1 % (3 %) of the values off by more than 3 levels. DALI resizes in
float32 and rounds once, torch's uint8 resize rounds between its two passes.
"""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvp_ray.config import DataConfig, TransformConfig, ViewGroupConfig, ViewsConfig
from hvp_ray.randomness import Purpose
from hvp_ray.recipes import get_recipe
from hvp_ray.records import ViewPlan
from hvp_ray.views import render_dali
from hvp_ray.views.plan import draw_plan
from hvp_ray.views.render_cpu import CpuRenderer
from hvp_ray.views.render_dali import DaliExecution, DaliRenderer
from tests.helpers import NEUTRAL, encode, groups_of_recipes, photograph_like, views_config
from tests.unit.data import bombs

OPERATIONS: dict[str, dict[str, float]] = {
    "crop": {},
    "flip": {"flip_probability": 1.0},
    "brightness": {"jitter_probability": 1.0, "contrast": 0.0, "saturation": 0.0, "hue_turns": 0.0},
    "contrast": {"jitter_probability": 1.0, "brightness": 0.0, "saturation": 0.0, "hue_turns": 0.0},
    "saturation": {"jitter_probability": 1.0, "brightness": 0.0, "contrast": 0.0, "hue_turns": 0.0},
    "hue": {"jitter_probability": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0},
    "grey": {"grayscale_probability": 1.0},
    "blur": {"blur_probability": 1.0},
}


def _batch(generator: np.random.Generator, count: int = 8, size_px: int = 64) -> tuple[list[bytes], NDArray[np.int32]]:
    """Images of two to four times the size of a view. (Beyond eight times DALI's filter differs by more.)"""
    sizes = [(2 * size_px + 10 * i, 4 * size_px - 7 * i) for i in range(count)]
    images = [encode(photograph_like(generator, h, w), "JPEG", quality=92) for h, w in sizes]
    return images, np.array(sizes, np.int32)


def _plan(views: ViewsConfig, sizes: NDArray[np.int32], num_views: int = 2) -> ViewPlan:
    return draw_plan(
        seed=0,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=np.arange(len(sizes)),
        image_sizes=(sizes[:, 0].copy(), sizes[:, 1].copy()),
        num_views=num_views,
        group=views.global_views,
    )


def _differences(views: ViewsConfig, images: list[bytes], plan: ViewPlan) -> NDArray[np.float64]:
    cpu = CpuRenderer(views, DataConfig(source="list")).render(images, plan)
    dali = DaliRenderer(views, DataConfig(source="list"), name="dali-cpu").render(images, plan)
    assert cpu.failures.keys() == dali.failures.keys()
    return np.abs(cpu.global_pixels.astype(np.float64) - dali.global_pixels)


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_each_operation_agrees_with_the_cpu_renderer(generator: np.random.Generator, operation: str) -> None:
    views = views_config(64, dataclasses.replace(NEUTRAL, **OPERATIONS[operation]))
    images, sizes = _batch(generator)
    difference = _differences(views, images, _plan(views, sizes))
    assert difference.mean() < 0.5
    assert (difference > 3).mean() < 0.01


GROUPS = groups_of_recipes()


@pytest.mark.parametrize("name", list(GROUPS))
def test_whole_chain_of_each_recipe_agrees_with_the_cpu_renderer(generator: np.random.Generator, name: str) -> None:
    group = GROUPS[name]
    views = ViewsConfig(global_views=group, evaluation_resize_px=group.size_px)
    images, sizes = _batch(generator, size_px=max(16, group.size_px))
    difference = _differences(views, images, _plan(views, sizes, num_views=4))
    # At 8 px one value is the mean of many, and the two filters' tails show.
    tiny = group.size_px < 16
    assert difference.mean() < (0.8 if tiny else 0.5)
    assert (difference > 3).mean() < (0.03 if tiny else 0.01)


def test_solarize_and_bicubic_agree_away_from_the_threshold(generator: np.random.Generator) -> None:
    transform = dataclasses.replace(NEUTRAL, solarize_probability=1.0, interpolation="bicubic")
    views = views_config(64, transform)
    images, sizes = _batch(generator)
    difference = _differences(views, images, _plan(views, sizes))
    assert np.median(difference) == 0
    assert (difference > 3).mean() < 0.02


def test_odd_and_damaged_images_are_treated_as_by_the_cpu_renderer(generator: np.random.Generator) -> None:
    views = views_config(48, TransformConfig())
    jpegs, _ = _batch(generator, 2)
    grey = encode(photograph_like(generator, 60, 80)[..., 0])
    images = [jpegs[0], grey, jpegs[1][: len(jpegs[1]) // 2], b"", encode(photograph_like(generator, 90, 1))]
    sizes = np.array([[128, 256], [60, 80], [138, 249], [1, 1], [90, 1]], np.int32)
    plan = _plan(views, sizes)
    dali = DaliRenderer(views, DataConfig(source="list"), name="dali-cpu").render(images, plan)
    assert sorted(dali.failures) == [2, 3]
    assert not dali.global_pixels[:, [2, 3]].any()
    assert _differences(views, images, plan).mean() < 0.5


def test_batches_of_other_sizes_and_view_counts_follow_each_other(generator: np.random.Generator) -> None:
    views = views_config(32, TransformConfig())
    images, sizes = _batch(generator)
    renderer = DaliRenderer(views, DataConfig(source="list"), name="dali-cpu")
    four = renderer.render(images, _plan(views, sizes, num_views=4)).global_pixels
    for count, num_views in ((3, 2), (8, 4), (5, 4)):
        part = renderer.render(images[:count], _plan(views, sizes[:count], num_views=num_views)).global_pixels
        assert np.array_equal(part, four[:num_views, :count])


def test_local_views_come_from_the_same_decode(generator: np.random.Generator) -> None:
    views = ViewsConfig(
        global_views=ViewGroupConfig(size_px=48), local_views=ViewGroupConfig(size_px=24), evaluation_resize_px=48
    )
    images, sizes = _batch(generator, 4)
    plan = _plan(views, sizes)
    local = _plan(views_config(24, TransformConfig()), sizes, num_views=3)
    cpu = CpuRenderer(views, DataConfig(source="list")).render(images, plan, local)
    dali = DaliRenderer(views, DataConfig(source="list"), name="dali-cpu").render(images, plan, local)
    assert cpu.local_pixels is not None
    assert dali.local_pixels is not None
    assert dali.local_pixels.shape == (3, 4, 24, 24, 3)
    assert np.abs(cpu.local_pixels.astype(int) - dali.local_pixels).mean() < 0.5


def test_jpegs_beyond_the_limits_never_come_to_dali(generator: np.random.Generator) -> None:
    """A fine JPEG above the limit would be rendered by DALI; headers that lie and many scans would hang or kill it."""
    views = views_config(16, NEUTRAL)
    fine = [encode(photograph_like(generator, size, size), "JPEG") for size in (32, 33)]
    images = [*fine, bombs.jpeg(65_500, 65_500), bombs.jpeg_of_scans(32, 32, 5_000)]
    plan = _plan(views, np.full((4, 2), 32, np.int32))
    rendered = DaliRenderer(views, DataConfig(source="list", max_image_pixels=32 * 32), name="dali-cpu").render(
        images, plan
    )
    assert sorted(rendered.failures) == [1, 2, 3]
    assert "33 x 33 px is more than data.max_image_pixels" in rendered.failures[1]
    assert "65500 x 65500 px is more than data.max_image_pixels" in rendered.failures[2]
    assert "scans" in rendered.failures[3]
    assert rendered.global_pixels[:, 0].any()


def test_lanes_change_no_pixel(generator: np.random.Generator) -> None:
    views = ViewsConfig(
        global_views=ViewGroupConfig(size_px=48), local_views=ViewGroupConfig(size_px=24), evaluation_resize_px=48
    )
    images, sizes = _batch(generator, 5)
    images[1] = b"no image"
    plan, local = _plan(views, sizes), _plan(views_config(24, TransformConfig()), sizes, num_views=3)
    one, three = (
        DaliRenderer(
            views, DataConfig(source="list"), name="dali-cpu", execution=DaliExecution(num_lanes=num_lanes)
        ).render(images, plan, local)
        for num_lanes in (1, 3)
    )
    assert sorted(three.failures) == [1]
    assert np.array_equal(one.global_pixels, three.global_pixels)
    assert one.local_pixels is not None
    assert np.array_equal(one.local_pixels, three.local_pixels)


@pytest.mark.parametrize("recipe", ["simsiam-imagenet-r50-100ep", "dino-imagenet-vits16-100ep"])
def test_graphs_for_a_gpu_are_defined_without_one(recipe: str) -> None:
    """As far as DALI goes: every operation takes its inputs on the device; only the driver is missing."""
    views = get_recipe(recipe).views
    group = views.global_views
    (kind,) = render_dali._kinds_of_views(group, 4)
    assert kind.view_indices == [0, 1, 2, 3]
    definitions = [
        render_dali._define_decode(render_dali.ON_A_GPU, on_gpu=True),
        render_dali._define_views(group.size_px, kind.interpolation, on_gpu=True),
    ]
    for define in definitions:
        pipeline = define(batch_size=8, num_threads=1, device_id=0, prefetch_queue_depth=1, exec_dynamic=True)
        pipeline._build_graph()
        assert [output.device for output in pipeline._graph_outputs] == ["gpu"]
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="CUDA is not available"):
                pipeline.build()


def test_views_of_other_filters_are_a_graph_of_their_own(generator: np.random.Generator) -> None:
    even = TransformConfig(blur_probability=1.0, blur_kernel_px=5)
    odd = dataclasses.replace(even, blur_kernel_px=9, interpolation="bicubic")
    group = ViewGroupConfig(size_px=32, even=even, odd=odd)
    views = ViewsConfig(global_views=group, evaluation_resize_px=32)
    assert [kind.view_indices for kind in render_dali._kinds_of_views(group, 3)] == [[0, 2], [1]]
    images, sizes = _batch(generator, 4)
    difference = _differences(views, images, _plan(views, sizes, num_views=3))
    assert difference.mean() < 0.5


def test_hue_goes_round_the_whole_circle(generator: np.random.Generator) -> None:
    """Every sextant of the shift, on every hue of the image."""
    views = views_config(48, dataclasses.replace(NEUTRAL, jitter_probability=1.0, brightness=0.0, contrast=0.0,
                                                 saturation=0.0, hue_turns=0.5))  # fmt: skip
    images = [encode(generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(13)]
    plan = _plan(views, np.full((13, 2), 48, np.int32))
    turns = np.broadcast_to(np.linspace(-0.5, 0.5, 13, dtype=np.float32), (2, 13)).copy()
    plan = dataclasses.replace(plan, hue_turns=turns, top=plan.top * 0, left=plan.left * 0,
                               height=plan.height * 0 + 48, width=plan.width * 0 + 48)  # fmt: skip
    assert _differences(views, images, plan).max() <= 1
