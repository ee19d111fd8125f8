"""The CPU renderer: one thread, libjpeg-turbo, torch's antialiased uint8 resize, OpenCV for colour and blur.

Order of operations: crop, resize, jitter, grey, blur, solarize, flip. (A flip commutes with all the others, so it
does not matter that some methods list it earlier.)
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from hvp_ray.config import RendererName, TransformConfig, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb
from hvp_ray.errors import UnreadableImageError
from hvp_ray.records import ViewPlan
from hvp_ray.views import color
from hvp_ray.views.renderer import RenderedBatch


class CpuRenderer:
    """Renders on one CPU core; see `Renderer`."""

    name: RendererName = "cpu"

    def __init__(self, views: ViewsConfig, *, max_image_pixels: int) -> None:
        self._views = views
        self._max_image_pixels = max_image_pixels

    def render(
        self, images: Sequence[bytes], global_plan: ViewPlan, local_plan: ViewPlan | None = None
    ) -> RenderedBatch:
        """Decode each image once and render all its views while it is in the cache."""
        groups = [(global_plan, self._views.global_views)]
        if local_plan is not None:
            assert self._views.local_views is not None
            groups.append((local_plan, self._views.local_views))
        outputs = [np.zeros((p.num_views, len(images), g.size_px, g.size_px, 3), np.uint8) for p, g in groups]
        failures: dict[int, str] = {}
        for index, image in enumerate(images):
            try:
                pixels = decode_rgb(image, max_pixels=self._max_image_pixels)
            except UnreadableImageError as error:
                failures[index] = str(error)
                continue
            for (plan, group), output in zip(groups, outputs, strict=True):
                for view_index in range(plan.num_views):
                    output[view_index, index] = render_view(pixels, plan, view_index, index, group)
        return RenderedBatch(
            global_pixels=outputs[0], local_pixels=outputs[1] if len(outputs) > 1 else None, failures=failures
        )


def render_view(
    pixels: NDArray[np.uint8], plan: ViewPlan, view_index: int, image_index: int, group: ViewGroupConfig
) -> NDArray[np.uint8]:
    """Render one view, [S, S, 3] uint8, from decoded pixels [H, W, 3]."""
    transform = group.transform_of(view_index)
    at = (view_index, image_index)
    top, left, height, width = (int(edge[at]) for edge in (plan.top, plan.left, plan.height, plan.width))
    crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    view = resize(crop, group.size_px, transform.interpolation)
    if plan.jitter[at] or plan.grayscale[at]:
        view = _recolour(view, plan, at)
    sigma_px = float(plan.blur_sigma_px[at])
    if sigma_px > 0.0:
        view = blur(view, sigma_px, transform)
    if plan.solarize[at]:
        view = color.solarize(view)
    return view[:, ::-1] if plan.flip[at] else view


def resize(crop: NDArray[np.uint8], size_px: int, interpolation: str) -> NDArray[np.uint8]:
    """Resize to [size_px, size_px, 3], antialiased; equal to torchvision on uint8 tensors, bit for bit."""
    tensor = torch.from_numpy(crop).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(
        tensor, size=(size_px, size_px), mode=interpolation, align_corners=False, antialias=True
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def blur(view: NDArray[np.uint8], sigma_px: float, transform: TransformConfig) -> NDArray[np.uint8]:
    """Blur with a Gaussian kernel of `blur_kernel_px`, border reflected; one rounding."""
    kernel = gaussian_kernel(sigma_px, transform.blur_kernel_px)
    blurred: NDArray[np.uint8] = cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    return blurred


def gaussian_kernel(sigma_px: float, kernel_px: int) -> NDArray[np.float32]:
    """Return the normalised kernel, [kernel_px]: the density at whole pixels, as torchvision samples it."""
    offsets = np.arange(kernel_px, dtype=np.float64) - kernel_px // 2
    density = np.exp(-0.5 * (offsets / sigma_px) ** 2)
    return (density / density.sum()).astype(np.float32)


def _recolour(view: NDArray[np.uint8], plan: ViewPlan, at: tuple[int, int]) -> NDArray[np.uint8]:
    levels = view.astype(np.float32)
    if plan.jitter[at]:
        levels = color.jitter(
            levels,
            order=plan.jitter_order[at].tolist(),
            brightness=float(plan.brightness[at]),
            contrast=float(plan.contrast[at]),
            saturation=float(plan.saturation[at]),
            hue_turns=float(plan.hue_turns[at]),
        )
    if plan.grayscale[at]:
        levels = color.to_grey(levels)
    return color.round_to_levels(levels)
