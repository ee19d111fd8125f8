"""The CPU renderer against torchvision: every operation, and the whole chain of every recipe. Units: uint8 levels.

Two oracles. `float`: torchvision on float tensors, the chain without rounding; ours must be it to half a level (and
the rounding of the inputs). `uint8`: torchvision on uint8 tensors, which cuts fractions off after each operation.
"""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from numpy.typing import NDArray

from hvp_ray.config import TransformConfig, ViewGroupConfig, ViewsConfig
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.views import color
from hvp_ray.views.plan import draw_plan
from hvp_ray.views.render_cpu import CpuRenderer, blur, render_view, resize
from tests.helpers import encode, groups_of_recipes, photograph_like
from tests.torchvision_views import channels_first, torchvision_view

KINDS = ("photograph", "gradient", "checkerboard", "grey", "one_px_wide", "black", "white")


def _image(kind: str, generator: np.random.Generator) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:120, 0:160]
    match kind:
        case "photograph":
            return photograph_like(generator, 120, 160)
        case "gradient":
            return np.stack([x * 255 // 159, y * 255 // 119, (x + y) * 255 // 278], axis=-1).astype(np.uint8)
        case "checkerboard":
            return np.repeat((((x // 4 + y // 4) % 2) * 255)[..., None], 3, axis=-1).astype(np.uint8)
        case "grey":
            return np.repeat(photograph_like(generator, 120, 160)[..., :1], 3, axis=-1)
        case "one_px_wide":
            return photograph_like(generator, 150, 1)
        case "black":
            return np.zeros((120, 160, 3), np.uint8)
    return np.full((120, 160, 3), 255, np.uint8)


def _hwc(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.permute(1, 2, 0).numpy().astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_equals_torchvision_bit_for_bit(generator: np.random.Generator, kind: str, interpolation: str) -> None:
    image = _image(kind, generator)
    height, width = image.shape[:2]
    top, left, h, w = height // 5, width // 7, height // 2, max(1, width // 2)
    crop = np.ascontiguousarray(image[top : top + h, left : left + w])
    mode = F.InterpolationMode(interpolation)
    expected = F.resized_crop(channels_first(image), top, left, h, w, [64, 64], interpolation=mode, antialias=True)
    assert np.array_equal(resize(crop, 64, interpolation), _hwc(expected))


OPERATIONS = {
    "brightness": (color.adjust_brightness, F.adjust_brightness, (0.0, 0.6, 1.4, 1.8)),
    "contrast": (color.adjust_contrast, F.adjust_contrast, (0.0, 0.6, 1.4, 1.8)),
    "saturation": (color.adjust_saturation, F.adjust_saturation, (0.0, 0.6, 1.4, 1.8)),
    "hue": (color.adjust_hue, F.adjust_hue, (-0.5, -0.2, -0.01, 0.1, 0.33, 0.5)),
    "grey": (lambda x, _: color.to_grey(x), lambda x, _: F.rgb_to_grayscale(x, 3), (0.0,)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_color_operation_is_torchvisions_to_half_a_level(generator: np.random.Generator, name: str, kind: str) -> None:
    ours, theirs, factors = OPERATIONS[name]
    image = _image(kind, generator)
    for factor in factors:
        rendered = color.round_to_levels(ours(image.astype(np.float32), factor)).astype(np.float64)
        exact = _hwc(theirs(channels_first(image).float() / 255, factor)) * 255
        assert np.abs(rendered - exact).max() <= 0.51
        truncated = _hwc(theirs(channels_first(image), factor))
        assert np.abs(rendered - truncated).max() <= (2 if name == "contrast" else 1)


@pytest.mark.parametrize("sigma_px", [0.1, 0.4, 1.0, 2.0])
@pytest.mark.parametrize("kernel_px", [5, 9, 23])
def test_blur_is_torchvisions_to_one_level(generator: np.random.Generator, sigma_px: float, kernel_px: int) -> None:
    image = photograph_like(generator, 64, 64)
    ours = blur(image, sigma_px, TransformConfig(blur_kernel_px=kernel_px)).astype(np.float64)
    theirs = _hwc(F.gaussian_blur(channels_first(image), [kernel_px, kernel_px], [sigma_px, sigma_px]))
    difference = np.abs(ours - theirs)
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_solarize_and_flip_are_torchvisions(generator: np.random.Generator) -> None:
    image = photograph_like(generator, 40, 50)
    assert np.array_equal(color.solarize(image), _hwc(F.solarize(channels_first(image), 128)))


CHAINS = groups_of_recipes() | {
    "every second view solarized": ViewGroupConfig(
        size_px=64,
        even=TransformConfig(interpolation="bicubic", saturation=0.2, blur_probability=1.0),
        odd=TransformConfig(interpolation="bicubic", saturation=0.2, blur_probability=0.1, solarize_probability=0.5),
    ),
}


@pytest.mark.parametrize("chain", list(CHAINS))
@pytest.mark.parametrize("kind", KINDS)
def test_whole_chain_is_torchvisions(generator: np.random.Generator, chain: str, kind: str) -> None:
    """Band: mean 0.05, worst 2 levels (a rounding that falls the other way, carried through blur)."""
    group, image = CHAINS[chain], _image(kind, generator)
    height, width = image.shape[:2]
    plan = draw_plan(
        seed=1,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=np.arange(12),
        heights=np.full(12, height, np.int32),
        widths=np.full(12, width, np.int32),
        num_views=2,
        group=group,
    )
    for v in range(2):
        for b in range(12):
            ours = render_view(image, plan, v, b, group).astype(np.float64)
            theirs = _hwc(torchvision_view(image, plan, v, b, group))
            difference = np.abs(ours - theirs)
            solarized = plan.solarize[v, b]  # a value beside the threshold may fall on its other side
            assert np.quantile(difference, 0.995) <= 1
            assert difference.max() <= (255 if solarized else 2)
            assert difference.mean() <= 0.1


def test_batch_renders_each_view_and_reports_damaged_images(generator: np.random.Generator) -> None:
    images = [encode(photograph_like(generator, 50, 60)), b"no image", encode(photograph_like(generator, 70, 40))]
    sizes = np.array([[50, 60], [1, 1], [70, 40]], np.int32)
    views = ViewsConfig(
        global_views=ViewGroupConfig(size_px=32), local_views=ViewGroupConfig(size_px=16), evaluation_resize_px=32
    )

    def plan(purpose: Purpose, group: ViewGroupConfig, num_views: int) -> ViewPlan:
        return draw_plan(
            seed=0, purpose=purpose, epoch=0, sample_ids=np.arange(3), heights=sizes[:, 0], widths=sizes[:, 1],
            num_views=num_views, group=group,
        )  # fmt: skip

    global_plan = plan(Purpose.GLOBAL_VIEWS, views.global_views, 2)
    local_plan = plan(Purpose.LOCAL_VIEWS, views.local_views, 3)
    rendered = CpuRenderer(views, max_image_pixels=10**6).render(images, global_plan, local_plan)
    assert rendered.global_pixels.shape == (2, 3, 32, 32, 3)
    assert rendered.local_pixels is not None
    assert rendered.local_pixels.shape == (3, 3, 16, 16, 3)
    assert list(rendered.failures) == [1]
    assert not rendered.global_pixels[:, 1].any()
    assert rendered.global_pixels[:, 0].any()
    assert rendered.local_pixels[:, 2].any()


def test_pixels_are_the_same_without_avx2(generator: np.random.Generator, tmp_path: object) -> None:
    """OpenCV with its vector extensions switched off gives the same bytes."""
    import hashlib
    import os
    import subprocess
    import sys

    program = (
        "import numpy as np, hashlib\n"
        "from hvp_ray.config import TransformConfig, ViewGroupConfig, ViewsConfig\n"
        "from hvp_ray.randomness import Purpose\n"
        "from hvp_ray.views.plan import draw_plan\n"
        "from hvp_ray.views.render_cpu import render_view\n"
        "image = (np.add.outer(np.arange(90), np.arange(110))[..., None] * [1, 2, 3] % 256).astype(np.uint8)\n"
        "group = ViewGroupConfig(size_px=48, even=TransformConfig(jitter_probability=1.0))\n"
        "plan = draw_plan(seed=0, purpose=Purpose.GLOBAL_VIEWS, epoch=0, sample_ids=np.arange(40),\n"
        "    heights=np.full(40, 90, np.int32), widths=np.full(40, 110, np.int32), num_views=1, group=group)\n"
        "pixels = np.stack([render_view(image, plan, 0, b, group) for b in range(40)])\n"
        "print(hashlib.sha256(pixels.tobytes()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | extra,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in (
            {},
            {"OPENCV_CPU_DISABLE": "AVX512_SKX,AVX2,FP16,AVX,SSE4_2,SSE4_1", "NPY_DISABLE_CPU_FEATURES": ""},
        )
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == hashlib.sha256().digest_size * 2
