"""(a) Pixels of DALI on a GPU against DALI on a CPU, the CPU renderer and torchvision, in uint8 levels.

Operations are compared on the same pixels (photographs encoded losslessly), so that they are seen without the decoder;
decoding is a row of its own, and the chains are compared both ways.
"""

import dataclasses

import numpy as np

from benchmarks.gpu.check import Check
from benchmarks.photographs import CHAINS, MAX_IMAGE_PIXELS, Photographs, as_png, load_photographs
from benchmarks.pixel_differences import OPERATIONS, Pixels, differences, views_by_torchvision
from benchmarks.results_file import Results
from hvp_ray.config import DataConfig, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb
from hvp_ray.recipes import get_recipe
from hvp_ray.views.render_cpu import CpuRenderer
from hvp_ray.views.render_dali import DaliExecution, DaliRenderer
from tests.helpers import NEUTRAL


def run(check: Check) -> Results:
    """Compare."""
    count, size_px = check.amount(16, 3), check.amount(224, 48)
    photographs = load_photographs(check.data, count)
    decoded = [decode_rgb(image, max_pixels=MAX_IMAGE_PIXELS) for image in photographs.images]
    lossless = Photographs(images=[as_png(pixels) for pixels in decoded], sizes=photographs.sizes)
    yield from _compare_decoding(check, photographs, decoded)
    for chain, recipe in CHAINS.items():
        views = get_recipe(recipe).views
        groups = {"": views.global_views} | ({", local views": views.local_views} if views.local_views else {})
        for suffix, group in groups.items():
            yield from _compare(check, f"chain of {chain}{suffix}", lossless, decoded, group)
            yield from _compare(check, f"chain of {chain}{suffix}, from JPEG", photographs, decoded, group)
    for name, changes in OPERATIONS.items():
        group = ViewGroupConfig(size_px=size_px, even=dataclasses.replace(NEUTRAL, **changes))
        yield from _compare(check, name, lossless, decoded, group)


def _compare_decoding(check: Check, photographs: Photographs, decoded: list[Pixels]) -> Results:
    views = ViewsConfig(global_views=ViewGroupConfig(size_px=32), evaluation_resize_px=32)
    renderer = DaliRenderer(views, DataConfig(source="photographs"), name=check.renderer)
    tensors = renderer.decode([np.frombuffer(image, np.uint8) for image in photographs.images])
    ours = [_on_host(tensor) for tensor in tensors]
    yield from differences("decoding", "cpu", ours, decoded)


def _on_host(tensor: object) -> Pixels:
    return np.asarray(tensor.as_cpu() if hasattr(tensor, "as_cpu") else tensor)


def _compare(
    check: Check, name: str, photographs: Photographs, decoded: list[Pixels], group: ViewGroupConfig
) -> Results:
    """Compare two views of each photograph."""
    views = ViewsConfig(global_views=group, evaluation_resize_px=group.size_px)
    plan = photographs.plan(group, 2)
    one_lane = DaliExecution(num_threads=8)  # graphs take seconds to build, and lanes change no pixel
    ours = DaliRenderer(views, DataConfig(source="photographs"), name=check.renderer, execution=one_lane)
    pixels = ours.render(photographs.images, plan).global_pixels
    twin = DaliRenderer(views, DataConfig(source="photographs"), name="dali-cpu", execution=one_lane)
    yield from differences(name, "dali-cpu", [pixels], [twin.render(photographs.images, plan).global_pixels])
    cpu = CpuRenderer(views, DataConfig(source="photographs")).render(photographs.images, plan)
    yield from differences(name, "cpu", [pixels], [cpu.global_pixels])
    yield from differences(name, "torchvision", [pixels], [views_by_torchvision(decoded, plan, group)])
