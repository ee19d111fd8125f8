"""The CPU renderer against torchvision: every operation, and the whole chain of every recipe. Units: uint8 levels.

Two oracles. `float`: torchvision on float tensors, the chain without rounding; ours must be it to half a level (and
the rounding of the inputs). `uint8`: torchvision on uint8 tensors, which cuts fractions off after each operation.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from numpy.typing import NDArray

from hvp_ray.config import DataConfig, TransformConfig, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.views import color
from hvp_ray.views.blur_kernel import gaussian_kernel
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
    resized = np.empty((64, 64, 3), np.uint8)
    resize(crop, resized, interpolation=interpolation)
    assert np.array_equal(resized, _hwc(expected))


def _saturation(pixels: NDArray[np.float32], factor: float) -> None:
    color.update_saturation(pixels, factor, spare=np.empty_like(pixels))


def _hue(pixels: NDArray[np.float32], turns: float) -> None:
    color.update_hue(pixels, turns, spare=np.empty_like(pixels))


def _grey(pixels: NDArray[np.float32], _: float) -> None:
    pixels[:] = color.grey_of(pixels)[..., None]


OPERATIONS = {
    "brightness": (color.update_brightness, F.adjust_brightness, (0.0, 0.6, 1.4, 1.8)),
    "contrast": (color.update_contrast, F.adjust_contrast, (0.0, 0.6, 1.4, 1.8)),
    "saturation": (_saturation, F.adjust_saturation, (0.0, 0.6, 1.4, 1.8)),
    "hue": (_hue, F.adjust_hue, (-0.5, -0.2, -0.01, 0.1, 0.33, 0.5)),
    "grey": (_grey, lambda x, _: F.rgb_to_grayscale(x, 3), (0.0,)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_color_operation_is_torchvisions_to_half_a_level(generator: np.random.Generator, name: str, kind: str) -> None:
    update, theirs, factors = OPERATIONS[name]
    image = _image(kind, generator)
    for factor in factors:
        levels, rounded = image.astype(np.float32), np.empty_like(image)
        update(levels, factor)
        color.round_to_levels(levels, out=rounded)
        rendered = rounded.astype(np.float64)
        exact = _hwc(theirs(channels_first(image).float() / 255, factor)) * 255
        assert np.abs(rendered - exact).max() <= 0.51
        truncated = _hwc(theirs(channels_first(image), factor))
        assert np.abs(rendered - truncated).max() <= (2 if name == "contrast" else 1)


@pytest.mark.parametrize("kind", ["photograph", "black", "white"])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_color_operation_stays_between_black_and_white(generator: np.random.Generator, name: str, kind: str) -> None:
    """Where a factor cannot leave the range nothing is clamped; rounding errors are all that may be beyond."""
    update, _, factors = OPERATIONS[name]
    for factor in factors:
        levels = _image(kind, generator).astype(np.float32)
        update(levels, factor)
        assert levels.min() >= -1e-4
        assert levels.max() <= 255 + 1e-4


def _blurred(image: NDArray[np.uint8], kernel: NDArray[np.float32]) -> NDArray[np.float64]:
    blurred = np.empty_like(image)
    blur(image, blurred, kernel=kernel)
    return blurred.astype(np.float64)


@pytest.mark.parametrize("sigma_px", [0.1, 0.4, 1.0, 2.0])
@pytest.mark.parametrize("kernel_px", [5, 9, 23])
def test_blur_is_torchvisions_to_one_level(generator: np.random.Generator, sigma_px: float, kernel_px: int) -> None:
    image = photograph_like(generator, 64, 64)
    ours = _blurred(image, gaussian_kernel(sigma_px, kernel_px))
    theirs = _hwc(F.gaussian_blur(channels_first(image), [kernel_px, kernel_px], [sigma_px, sigma_px]))
    difference = np.abs(ours - theirs)
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_solarize_and_flip_are_torchvisions(generator: np.random.Generator) -> None:
    image = photograph_like(generator, 40, 50)
    solarized = np.empty_like(image)
    color.solarize(image, out=solarized)
    assert np.array_equal(solarized, _hwc(F.solarize(channels_first(image), 128)))


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
        image_sizes=(np.full(12, height, np.int32), np.full(12, width, np.int32)),
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


SIZES = np.array([[50, 60], [1, 1], [70, 40], [300, 200]], np.int32)
VIEWS = ViewsConfig(
    global_views=ViewGroupConfig(
        size_px=32,
        even=TransformConfig(blur_probability=1.0, interpolation="bicubic"),
        odd=TransformConfig(blur_probability=0.1, solarize_probability=0.5),
    ),
    local_views=ViewGroupConfig(size_px=16),
    evaluation_resize_px=32,
)


def _images(generator: np.random.Generator) -> list[bytes]:
    images = [encode(photograph_like(generator, height, width), "JPEG") for height, width in SIZES.tolist()]
    images[1] = b"no image"
    return images


def _plans(num_views: int, num_local_views: int, images: slice = slice(None)) -> tuple[ViewPlan, ViewPlan]:
    assert VIEWS.local_views is not None
    groups = ((Purpose.GLOBAL_VIEWS, num_views, VIEWS.global_views),
              (Purpose.LOCAL_VIEWS, num_local_views, VIEWS.local_views))  # fmt: skip
    global_plan, local_plan = (
        draw_plan(
            seed=0,
            purpose=purpose,
            epoch=0,
            sample_ids=np.arange(4)[images],
            image_sizes=(SIZES[images, 0].copy(), SIZES[images, 1].copy()),
            num_views=count,
            group=group,
        )
        for purpose, count, group in groups
    )
    return global_plan, local_plan


def test_batch_renders_each_view_and_reports_damaged_images(generator: np.random.Generator) -> None:
    rendered = CpuRenderer(VIEWS, DataConfig(source="list")).render(_images(generator), *_plans(2, 3))
    assert rendered.global_pixels.shape == (2, 4, 32, 32, 3)
    assert rendered.local_pixels is not None
    assert rendered.local_pixels.shape == (3, 4, 16, 16, 3)
    assert list(rendered.failures) == [1]
    assert not rendered.global_pixels[:, 1].any()
    assert rendered.global_pixels[:, 0].any()
    assert rendered.local_pixels[:, 2].any()


def test_view_in_a_batch_is_the_view_rendered_alone(generator: np.random.Generator) -> None:
    """Whatever a view is rendered into, and whatever was on the canvas before: the same bits."""
    images, (global_plan, local_plan) = _images(generator), _plans(16, 5)
    rendered = CpuRenderer(VIEWS, DataConfig(source="list")).render(images, global_plan, local_plan)
    assert VIEWS.local_views is not None
    groups = ((global_plan, VIEWS.global_views, rendered.global_pixels),
              (local_plan, VIEWS.local_views, rendered.local_pixels))  # fmt: skip
    for image_index in (0, 2, 3):
        decoded = decode_rgb(images[image_index], max_pixels=10**6)
        untouched = decoded.copy()
        for plan, group, pixels in groups:
            assert pixels is not None
            for view_index in range(plan.num_views):
                alone = render_view(decoded, plan, view_index, image_index, group)
                assert np.array_equal(pixels[view_index, image_index], alone)
        assert np.array_equal(decoded, untouched)


def test_pixels_do_not_depend_on_the_batch_nor_on_the_number_of_views(generator: np.random.Generator) -> None:
    """The vanilla arm trains on views 0 and 1 of the hard arm, and any worker renders any batch."""
    images = _images(generator)
    renderer = CpuRenderer(VIEWS, DataConfig(source="list"))
    whole = renderer.render(images, *_plans(4, 6))
    two = renderer.render(images, *_plans(2, 3))
    assert np.array_equal(two.global_pixels, whole.global_pixels[:2])
    assert two.local_pixels is not None
    assert whole.local_pixels is not None
    assert np.array_equal(two.local_pixels, whole.local_pixels[:3])
    for index in range(4):
        one = renderer.render(images[index : index + 1], *_plans(4, 6, slice(index, index + 1)))
        assert np.array_equal(one.global_pixels[:, 0], whole.global_pixels[:, index])
    again = renderer.render(images, *_plans(4, 6))
    assert np.array_equal(again.global_pixels, whole.global_pixels)


def _pixels_on(folder: Path, **switches: str) -> NDArray[np.uint8]:
    """Render the chains of some recipes in a process of its own, with parts of the CPU switched off."""
    np.save(folder / "image.npy", photograph_like(np.random.default_rng(5), 300, 400))
    program = (
        "import sys, cv2, numpy as np\n"
        "from hvp_ray.randomness import Purpose\n"
        "from hvp_ray.recipes import get_recipe\n"
        "from hvp_ray.views.plan import draw_plan\n"
        "from hvp_ray.views.render_cpu import render_view\n"
        "image = np.load(sys.argv[1])\n"
        "views = []\n"
        "for recipe in ('simsiam-imagenet-r50-100ep', 'simclr-imagenet-r50-100ep', 'dino-imagenet-vits16-100ep'):\n"
        "    group = get_recipe(recipe).views.global_views\n"
        "    plan = draw_plan(seed=0, purpose=Purpose.GLOBAL_VIEWS, epoch=0, sample_ids=np.arange(8), num_views=2,\n"
        "        image_sizes=(np.full(8, 300, np.int32), np.full(8, 400, np.int32)), group=group)\n"
        "    views += [render_view(image, plan, v, b, group) for v in range(2) for b in range(8)]\n"
        "np.save(sys.argv[2], np.stack(views))\n"
    )
    command = [sys.executable, "-c", program, str(folder / "image.npy"), str(folder / "views.npy")]
    subprocess.run(command, env=os.environ | switches, capture_output=True, text=True, check=True)
    pixels: NDArray[np.uint8] = np.load(folder / "views.npy")
    return pixels


def test_pixels_are_the_same_with_avx2_and_with_avx512(tmp_path: Path) -> None:
    """OpenCV, Intel's primitives in it, torch and NumPy; on a CPU without AVX-512 there is nothing to switch off."""
    everything = _pixels_on(tmp_path)
    only_avx2 = {
        "OPENCV_CPU_DISABLE": "AVX512-SKX",
        "ATEN_CPU_CAPABILITY": "avx2",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    }
    for switches in (only_avx2 | {"OPENCV_IPP": "avx2"}, only_avx2 | {"OPENCV_IPP": "disabled"}):
        assert np.array_equal(_pixels_on(tmp_path, **switches), everything)


def test_pixels_without_avx2_differ_beside_rounding_ties_only(tmp_path: Path) -> None:
    """A CPU before 2013 rounds products before it adds them: some values in a million fall on the other side of a tie."""
    everything = _pixels_on(tmp_path)
    switched_off = {"OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,FP16,AVX,SSE4.2,SSE4.1", "OPENCV_IPP": "disabled"}
    difference = np.abs(_pixels_on(tmp_path, **switched_off).astype(int) - everything)
    solarized_apart = difference > 1  # a value beside the threshold of 128
    assert solarized_apart.mean() < 1e-5
    assert (difference > 0).mean() < 1e-4
