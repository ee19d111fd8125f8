"""Views of images that are not RGB: channels are rendered alike and apart, and nothing that needs RGB is planned."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as F

from hvp_ray.config import DataConfig, TransformConfig, ViewGroupConfig
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.views.color import BRIGHTNESS, CONTRAST
from hvp_ray.views.decoded import decode_used
from hvp_ray.views.plan import draw_plan
from hvp_ray.views.render_cpu import CpuRenderer, render_view
from tests.helpers import views_config

HEIGHT, WIDTH, VIEWS = 40, 52, 24
STRONG = TransformConfig(
    jitter_probability=0.7, grayscale_probability=0.4, blur_probability=0.5, blur_kernel_px=5, solarize_probability=0.3
)
WITHOUT_RGB = dataclasses.replace(STRONG, saturation=0.0, hue_turns=0.0, grayscale_probability=0.0)
GROUP = ViewGroupConfig(size_px=16, even=STRONG, odd=dataclasses.replace(STRONG, interpolation="bicubic"))


def _plan(channels: int, *, group: ViewGroupConfig = GROUP, images: int = 1) -> ViewPlan:
    return draw_plan(
        seed=5,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=2,
        sample_ids=np.arange(images),
        image_sizes=(np.full(images, HEIGHT, np.int32), np.full(images, WIDTH, np.int32)),
        num_views=VIEWS,
        group=group,
        channels=channels,
    )


def _image(channels: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)


def _npy(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def test_plan_of_other_channels_differs_in_nothing_but_what_needs_rgb() -> None:
    of_rgb, of_bands = _plan(3), _plan(5)
    differing = {
        field.name
        for field in dataclasses.fields(ViewPlan)
        if field.name != "mask" and not np.array_equal(getattr(of_rgb, field.name), getattr(of_bands, field.name))
    }
    assert differing == {"saturation", "hue_turns", "grayscale"}
    assert (of_bands.saturation == 1.0).all() and not of_bands.hue_turns.any() and not of_bands.grayscale.any()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 12])
def test_channels_are_rendered_as_if_each_were_alone(channels: int) -> None:
    """Except for contrast, which has one mean for all."""
    plan = dataclasses.replace(_plan(channels), contrast=np.ones((VIEWS, 1), np.float32))
    image = _image(channels)
    for view in range(VIEWS):
        together = render_view(image, plan, view, 0, GROUP)
        for channel in range(channels):
            alone = render_view(image[..., channel : channel + 1], plan, view, 0, GROUP)
            assert np.array_equal(together[..., channel], alone[..., 0])


def test_three_channels_equal_rgb_without_what_needs_rgb() -> None:
    """Three of five channels are what RGB is if saturation, hue and grey are off by the settings."""
    group = dataclasses.replace(GROUP, even=WITHOUT_RGB, odd=None)
    plan = dataclasses.replace(_plan(5, group=group), contrast=np.ones((VIEWS, 1), np.float32))
    image = _image(5)
    for view in range(VIEWS):
        of_rgb = render_view(np.ascontiguousarray(image[..., :3]), plan, view, 0, group)
        assert np.array_equal(of_rgb, render_view(image, plan, view, 0, group)[..., :3])


@pytest.mark.parametrize("channels", [1, 2, 5, 12])
def test_jitter_blends_with_the_mean_of_all_values(channels: int) -> None:
    plan, image = _plan(channels), _image(channels)
    group = dataclasses.replace(GROUP, odd=None)
    plain = dataclasses.replace(
        plan, solarize=np.zeros_like(plan.solarize), blur_sigma_px=np.zeros_like(plan.blur_sigma_px)
    )
    assert plain.jitter.sum() > VIEWS // 3
    for view in np.flatnonzero(plain.jitter[:, 0]).tolist():
        at = (view, 0)
        unchanged = dataclasses.replace(plain, jitter=np.zeros_like(plain.jitter))
        levels = render_view(image, unchanged, view, 0, group).astype(np.float64)
        for operation in plain.jitter_order[at]:
            if operation == BRIGHTNESS:
                levels = np.clip(levels * plain.brightness[at], 0, 255)
            elif operation == CONTRAST:
                factor = float(plain.contrast[at])
                levels = np.clip(factor * levels + (1 - factor) * levels.mean(), 0, 255)
        found = render_view(image, plain, view, 0, group)
        assert np.abs(found - levels).max() <= 0.51


@pytest.mark.parametrize("channels", [1, 5])
def test_crop_and_resize_equal_torchvision(channels: int) -> None:
    plan, image = _plan(channels), _image(channels)
    neutral = TransformConfig(
        flip_probability=0.0, jitter_probability=0.0, blur_probability=0.0, grayscale_probability=0.0
    )
    group = ViewGroupConfig(size_px=16, even=neutral)
    plan = _plan(channels, group=group)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for view in range(VIEWS):
        top, left, height, width = (int(edge[view, 0]) for edge in (plan.top, plan.left, plan.height, plan.width))
        expected = F.resized_crop(tensor, top, left, height, width, [16, 16], antialias=True)
        assert np.array_equal(render_view(image, plan, view, 0, group), expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_batch_equals_its_views_also_if_pixels_are_shipped(channels: int) -> None:
    data, group = DataConfig(source="list", channels=channels), dataclasses.replace(GROUP, odd=None)
    views = dataclasses.replace(views_config(16), global_views=group)
    plan, images = _plan(channels, group=group, images=3), [_image(channels), _image(channels)[::-1].copy()]
    encoded = [_npy(images[0]), b"damaged", _npy(images[1])]
    renderer = CpuRenderer(views, data)
    whole = renderer.render(encoded, plan)
    assert whole.global_pixels.shape == (VIEWS, 3, 16, 16, channels) and list(whole.failures) == [1]
    for view in range(VIEWS):
        for place, image in ((0, images[0]), (2, images[1])):
            alone = render_view(image, plan, view, place, group)
            assert np.array_equal(whole.global_pixels[view, place], alone)
    finished = renderer.render_decoded(decode_used(encoded, plan, None, data=data), plan)
    assert np.array_equal(finished.global_pixels, whole.global_pixels)
