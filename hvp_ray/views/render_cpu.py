"""The CPU renderer: one thread, libjpeg-turbo, torch's antialiased uint8 resize, OpenCV for colour and blur.

Order of operations: crop, resize, jitter, grey, blur, solarize, flip. A flip commutes with all others, so its place does
not matter. Every operation reads one array and writes another. The last one writes into the returned batch, the others into
`_Canvas`, which all views reuse.
"""

from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from hvp_ray.config import DataConfig, RendererName, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_pixels
from hvp_ray.errors import UnreadableImageError
from hvp_ray.records import DecodedImages, ViewPlan
from hvp_ray.views import color
from hvp_ray.views.blur_kernel import gaussian_kernel
from hvp_ray.views.renderer import RenderedBatch

Pixels = NDArray[np.uint8]
_Operation = Callable[[Pixels, Pixels], None]
"""Reads its first argument and writes its second."""

_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}
"""The kernels of torch.nn.functional.interpolate, which itself cannot write into existing memory."""


class CpuRenderer:
    """Renders on one CPU core; see `Renderer`."""

    name: RendererName = "cpu"

    def __init__(self, views: ViewsConfig, data: DataConfig) -> None:
        self._views = views
        self._data = data
        groups = [views.global_views] + ([views.local_views] if views.local_views else [])
        self._canvases = {group.size_px: _Canvas(group.size_px, data.channels) for group in groups}

    def render(
        self, images: Sequence[bytes], global_plan: ViewPlan, local_plan: ViewPlan | None = None
    ) -> RenderedBatch:
        """Decode each image once and render all its views while it is in the cache."""
        failures: dict[int, str] = {}
        data = self._data

        def decode(index: int) -> Pixels | None:
            try:
                return decode_pixels(images[index], data)
            except UnreadableImageError as error:
                failures[index] = str(error)
                return None

        return self._render_each(decode, global_plan, local_plan, failures)

    def render_decoded(
        self, decoded: DecodedImages, global_plan: ViewPlan, local_plan: ViewPlan | None = None
    ) -> RenderedBatch:
        """Render views of images that another process decoded and cut to their boxes; the bits equal those of `render`."""
        plans = [plan if plan is None else plan.within(decoded.boxes) for plan in (global_plan, local_plan)]
        assert plans[0] is not None
        images, failures = decoded.images(), dict(decoded.failures)
        return self._render_each(
            lambda index: None if index in failures else images[index], plans[0], plans[1], failures
        )

    def _render_each(
        self,
        image_of: Callable[[int], Pixels | None],
        global_plan: ViewPlan,
        local_plan: ViewPlan | None,
        failures: dict[int, str],
    ) -> RenderedBatch:
        groups = [(global_plan, self._views.global_views)]
        if local_plan is not None:
            assert self._views.local_views is not None
            groups.append((local_plan, self._views.local_views))
        num_images = global_plan.num_images
        outputs = [
            np.zeros((p.num_views, num_images, g.size_px, g.size_px, self._data.channels), np.uint8) for p, g in groups
        ]
        for index in range(num_images):
            pixels = image_of(index)
            if pixels is None:
                continue
            for (plan, group), output in zip(groups, outputs, strict=True):
                canvas = self._canvases[group.size_px]
                for view_index in range(plan.num_views):
                    _render_into(output[view_index, index], pixels, plan, (view_index, index), group, canvas)
        return RenderedBatch(
            global_pixels=outputs[0], local_pixels=outputs[1] if len(outputs) > 1 else None, failures=failures
        )


class _Canvas:
    """Intermediate memory for views of one size; every view overwrites it."""

    def __init__(self, size_px: int, channels: int) -> None:
        shape = (size_px, size_px, channels)
        self.between = (np.empty(shape, np.uint8), np.empty(shape, np.uint8))
        self.levels = np.empty(shape, np.float32)
        self.spare = np.empty(shape, np.float32)
        self.grey = np.empty(shape[:2], np.uint8)


def render_view(pixels: Pixels, plan: ViewPlan, view_index: int, image_index: int, group: ViewGroupConfig) -> Pixels:
    """Render one view, [S, S, C] uint8, from decoded pixels [H, W, C]."""
    channels = pixels.shape[2]
    view = np.empty((group.size_px, group.size_px, channels), np.uint8)
    _render_into(view, pixels, plan, (view_index, image_index), group, _Canvas(group.size_px, channels))
    return view


def _render_into(
    view: Pixels, pixels: Pixels, plan: ViewPlan, at: tuple[int, int], group: ViewGroupConfig, canvas: _Canvas
) -> None:
    transform = group.transform_of(at[0])
    top, left, height, width = (int(edge[at]) for edge in (plan.top, plan.left, plan.height, plan.width))
    operations: list[_Operation] = [partial(resize, interpolation=transform.interpolation)]
    if plan.jitter[at] or plan.grayscale[at]:
        operations.append(partial(_recolour, plan=plan, at=at, canvas=canvas))
    if plan.blur_sigma_px[at] > 0.0:
        kernel = gaussian_kernel(float(plan.blur_sigma_px[at]), transform.blur_kernel_px)
        if len(kernel) > 1:
            operations.append(partial(blur, kernel=kernel))
    if plan.solarize[at]:
        operations.append(_solarize)
    if plan.flip[at]:
        operations.append(_flip)
    # torch warns of read-only memory, such as pixels in Ray's object store; nothing writes to it.
    source = np.require(pixels[top : top + height, left : left + width], requirements=("C", "W"))
    for place, operation in enumerate(operations):
        target = view if place == len(operations) - 1 else canvas.between[place % 2]
        operation(source, target)
        source = target


def resize(crop: Pixels, out: Pixels, *, interpolation: str) -> None:
    """Resize a crop [h, w, C] into `out` [S, S, C], antialiased; equal to torchvision on uint8 tensors, bit for bit.

    Args:
        crop: contiguous; torch would copy any other first, more slowly than NumPy.
        out: contiguous.
        interpolation: bilinear or bicubic.
    """
    source, target = (torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0) for pixels in (crop, out))
    _RESIZE[interpolation](source, out.shape[:2], align_corners=False, out=target)


def blur(view: Pixels, out: Pixels, *, kernel: NDArray[np.float32]) -> None:
    """Blur a view [S, S, C] into `out` with a kernel for both directions, border reflected; one rounding."""
    cv2.sepFilter2D(view, -1, kernel, kernel, dst=out, borderType=cv2.BORDER_REFLECT_101)


def _recolour(view: Pixels, out: Pixels, *, plan: ViewPlan, at: tuple[int, int], canvas: _Canvas) -> None:
    levels = canvas.levels
    np.copyto(levels, view)
    if plan.jitter[at]:
        color.update_jitter(
            levels,
            order=plan.jitter_order[at].tolist(),
            brightness=float(plan.brightness[at]),
            contrast=float(plan.contrast[at]),
            saturation=float(plan.saturation[at]),
            hue_turns=float(plan.hue_turns[at]),
            spare=canvas.spare,
        )
    if plan.grayscale[at]:
        color.round_to_levels(color.grey_of(levels), out=canvas.grey)
        cv2.cvtColor(canvas.grey, cv2.COLOR_GRAY2RGB, dst=out)
    else:
        color.round_to_levels(levels, out=out)


def _solarize(view: Pixels, out: Pixels) -> None:
    color.solarize(view, out=out)


def _flip(view: Pixels, out: Pixels) -> None:
    cv2.flip(view, 1, dst=out)
