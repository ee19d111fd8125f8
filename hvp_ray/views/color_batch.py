"""Colour, blur and flip of many resized views, in torch: what the DALI renderer does after the resize.

`finish` has the operations of `render_cpu` in their order, for all views at once. On a GPU torch compiles it into a few
kernels. On a CPU it is called view by view, without the operations that the view does not have.

Brightness, contrast, saturation and grey are products with a 3 x 3 matrix of colours, and every blur is a sum over the same
distances. So a batch needs no case for an operation, a factor or a width. Colour is computed in float32 with a clamp after
each operation and rounded once.
"""

import functools
import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.config import ViewGroupConfig
from hvp_ray.errors import first_line
from hvp_ray.records import ViewPlan
from hvp_ray.views.blur_kernel import gaussian_kernel
from hvp_ray.views.color import CONTRAST, GREY_WEIGHTS, HUE, LEVEL_MAX, SATURATION

logger = logging.getLogger(__name__)

_EYE = np.eye(3, dtype=np.float32)
_GREY = np.tile(np.array(GREY_WEIGHTS, np.float32), (3, 1))
_PLACES = range(4)
"""Of an operation in the order of the jitter."""


class Operations(NamedTuple):
    """What happens to N views, in this order."""

    matrices: Tensor
    """[N, 4, 3, 3]: of the operations of the jitter in their order; the unit matrix for hue and for nothing."""
    mean_shares: Tensor
    """[N, 4]: share of the view's mean grey that is added after the matrix, for contrast."""
    is_hue: Tensor
    """[N, 4] bool."""
    hue_shifts: Tensor
    """[N, 3]: sextants from red, green and blue to the shifted hue, -3 to 3."""
    grey: Tensor
    """[N, 3, 3]: the matrix of grey, or the unit matrix."""
    half_kernels: Tensor
    """[N, R + 1]: the blur's weights at distances 0 to R px. 1, 0, 0 and so on: no blur."""
    is_solarized: Tensor
    """[N] bool."""
    is_flipped: Tensor
    """[N] bool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Which operations change a view, so that the others can be left out."""

    matrices: tuple[bool, ...]
    contrasts: tuple[bool, ...]
    hues: tuple[bool, ...]
    """[4] each."""
    grey: bool
    blur_radius_px: int
    solarize: bool
    flip: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlannedOperations:
    """The operations of a plan on the host: arrays [V, B, ...], or [N, ...], with the names of `Operations`."""

    arrays: dict[str, NDArray[Any]]

    @classmethod
    def of(cls, plan: ViewPlan, group: ViewGroupConfig) -> "PlannedOperations":
        """Return the operations of a group's plan, [V, B, ...]."""
        matrices, mean_shares = _jitter(plan)
        arrays = {
            "matrices": matrices,
            "mean_shares": mean_shares,
            "is_hue": (plan.jitter_order == HUE) & (plan.jitter & (plan.hue_turns != 0.0))[..., None],
            "hue_shifts": _hue_shifts(plan.hue_turns),
            "grey": np.where(plan.grayscale[..., None, None], _GREY, _EYE),
            "half_kernels": _half_kernels(plan, group),
            "is_solarized": plan.solarize,
            "is_flipped": plan.flip,
        }
        return cls(arrays=arrays)

    @classmethod
    def none(cls, num_views: int, radius_px: int) -> "PlannedOperations":
        """Return operations that change nothing, [N, ...]."""
        half_kernels = np.eye(1, radius_px + 1, dtype=np.float32)
        of_one = {
            "matrices": np.stack([_EYE] * len(_PLACES)),
            "mean_shares": np.zeros(len(_PLACES), np.float32),
            "is_hue": np.zeros(len(_PLACES), np.bool_),
            "hue_shifts": np.zeros(3, np.float32),
            "grey": _EYE,
            "half_kernels": half_kernels[0],
            "is_solarized": np.False_,
            "is_flipped": np.False_,
        }
        return cls(arrays={name: np.stack([value] * num_views) for name, value in of_one.items()})

    def of_samples(self, view_indices: list[int], images: slice) -> "PlannedOperations":
        """Return those of some views of some images, [N, ...]: all images of the first view, then of the next."""
        some = {name: values[view_indices, images] for name, values in self.arrays.items()}
        return PlannedOperations(arrays={name: values.reshape(-1, *values.shape[2:]) for name, values in some.items()})

    def on(self, device: torch.device) -> Operations:
        """Return arrays [N, ...] as tensors on a device."""
        return Operations(
            **{name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in self.arrays.items()}
        )

    def kinds(self) -> list[Kind]:
        """Return the kind of each of N views."""
        arrays = self.arrays
        has_matrix = (arrays["matrices"] != _EYE).any((2, 3))
        is_grey, radius_px = (arrays["grey"] != _EYE).any((1, 2)), (arrays["half_kernels"] != 0.0).sum(1) - 1
        return [
            Kind(
                matrices=tuple(has_matrix[sample].tolist()),
                contrasts=tuple((arrays["mean_shares"][sample] != 0.0).tolist()),
                hues=tuple(arrays["is_hue"][sample].tolist()),
                grey=bool(is_grey[sample]),
                blur_radius_px=int(radius_px[sample]),
                solarize=bool(arrays["is_solarized"][sample]),
                flip=bool(arrays["is_flipped"][sample]),
            )
            for sample in range(len(has_matrix))
        ]


def finish(planes: Tensor, operations: Operations, positions: Tensor, kind: Kind | None = None) -> Tensor:
    """Return the finished views, [N, 3, S, S] uint8.

    Args:
        planes: [N, 3, S, S] uint8: resized views.
        operations: of the N views.
        positions: `reflected_positions` of S and of a radius that no wider blur of these views has.
        kind: of all the views. None: their kinds differ, and every operation is computed for all.
    """

    def where(flags: Tensor, changed: Tensor, others: Tensor) -> Tensor:
        return changed if kind is not None else torch.where(flags[:, None, None, None], changed, others)

    levels = planes.to(torch.float32, memory_format=torch.contiguous_format)
    for place in _PLACES:
        before = levels
        if kind is None or kind.matrices[place]:
            levels = _multiply(operations.matrices[:, place], levels, one_by_one=kind is not None)
            if kind is None or kind.contrasts[place]:
                levels = levels + (operations.mean_shares[:, place] * _mean_grey(before))[:, None, None, None]
            levels = levels.clamp_(0.0, LEVEL_MAX)
        if kind is None or kind.hues[place]:
            levels = where(operations.is_hue[:, place], _shift_hue(before, operations.hue_shifts), levels)
    if kind is None or kind.grey:
        levels = _multiply(operations.grey, levels, one_by_one=kind is not None)
    levels = levels.round_()
    if kind is None or kind.blur_radius_px:
        for axis in (-1, -2):
            levels = _blur(levels, operations.half_kernels, positions, axis)
        levels = levels.round_()
    planes = levels.to(torch.uint8)
    if kind is None or kind.solarize:
        planes = where(operations.is_solarized, torch.minimum(planes, 255 - planes), planes)
    if kind is None or kind.flip:
        planes = where(operations.is_flipped, planes.flip(-1), planes)
    return planes


def finish_together(pixels: Tensor, operations: Operations, positions: Tensor) -> Tensor:
    """As `finish` for views of all kinds, [N, S, S, 3]; torch compiles this."""
    return finish(pixels.permute(0, 3, 1, 2), operations, positions).permute(0, 2, 3, 1).contiguous()


def largest_blur_radius_px(group: ViewGroupConfig) -> int:
    """Return R of `Operations`: the largest radius that the group's settings allow."""
    transforms = [group.transform_of(parity) for parity in range(2)]
    return max(t.blur_kernel_px // 2 if t.blur_probability > 0.0 else 0 for t in transforms)


def finish_views(pixels: Tensor, planned: PlannedOperations) -> Tensor:
    """Return the finished views, [N, S, S, 3] uint8, on the device of the resized ones.

    Args:
        pixels: [N, S, S, 3] uint8: resized views.
        planned: of the N views.
    """
    device, size_px = pixels.device, pixels.shape[1]
    operations = planned.on(device)
    if device.type != "cpu":
        radius_px, num_views = operations.half_kernels.shape[1] - 1, len(pixels)
        if num_views == 1:  # torch would compile anew for a single one
            pixels, operations = (
                torch.cat([pixels] * 2),
                Operations(*(torch.cat([of_all] * 2) for of_all in operations)),
            )
        positions = reflected_positions(size_px, radius_px, device)
        return compiled_finish(device, size_px, radius_px)(pixels, operations, positions)[:num_views]
    finished, planes = torch.empty_like(pixels), torch.empty(1, 3, size_px, size_px, dtype=torch.uint8)
    of_each = [of_all.split(1) for of_all in operations]
    for sample, kind in enumerate(planned.kinds()):  # one view stays in the cache
        cv2.split(pixels[sample].numpy(), list(planes[0].numpy()))
        of_one = Operations(*(of_all[sample] for of_all in of_each))
        done = finish(planes, of_one, reflected_positions(size_px, kind.blur_radius_px, device), kind)
        cv2.merge(list(done[0].numpy()), dst=finished[sample].numpy())
    return finished


@functools.cache
def compiled_finish(
    device: torch.device, size_px: int, radius_px: int
) -> Callable[[Tensor, Operations, Tensor], Tensor]:
    """Return `finish_together`, compiled for two and more views; or as it is, if torch cannot compile on this machine.

    Args:
        device: device of the views.
        size_px: S.
        radius_px: R of `Operations`.
    """
    num_views = 7  # of a trial
    operations = PlannedOperations.none(num_views, radius_px).on(device)
    pixels = torch.zeros(num_views, size_px, size_px, 3, dtype=torch.uint8, device=device)
    for of_views in (pixels, *operations):
        torch._dynamo.mark_dynamic(of_views, 0)
    try:
        # Without benchmarks of kernels, which might choose others in other processes, with other last bits.
        compiled = torch.compile(finish_together, fullgraph=True, options={"deterministic": True})
        compiled(pixels, operations, reflected_positions(size_px, radius_px, device))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:  # such as: there is no C compiler
        logger.warning("colour is not compiled, so rendering is slower: torch.compile failed (%s)", first_line(error))
        return finish_together
    return compiled


@functools.lru_cache(maxsize=64)
def reflected_positions(size_px: int, radius_px: int, device: torch.device) -> Tensor:
    """Return the positions whose values continue a line of S px by R px at both ends, reflected: [S + 2 R], 0 to S - 1."""
    positions = [
        cv2.borderInterpolate(place, size_px, cv2.BORDER_REFLECT_101)
        for place in range(-radius_px, size_px + radius_px)
    ]
    return torch.tensor(positions, device=device)


def _multiply(matrices: Tensor, levels: Tensor, *, one_by_one: bool) -> Tensor:
    """Return the product of matrices [N, 3, 3] with the colours of levels [N, 3, S, S]."""
    if one_by_one:  # faster on a CPU; a GPU might round differently in batches of other sizes
        return torch.matmul(matrices, levels.flatten(2)).view_as(levels)
    products = [matrices[:, :, color, None, None] * levels[:, color, None] for color in range(3)]  # becomes one kernel
    return products[0] + products[1] + products[2]


def _mean_grey(levels: Tensor) -> Tensor:
    """Return the mean grey of each view, [N]."""
    weights = torch.tensor(GREY_WEIGHTS, device=levels.device)
    return (levels.mean((2, 3)) * weights).sum(1)


def _shift_hue(levels: Tensor, shifts: Tensor) -> Tensor:
    """Shift the hue in HSV, in sextants from -3 to 3, without a case for each sextant.

    With value v and chroma c of a pixel, |hue| = 2 + (green + blue - red - v) / c; the hue is negative if blue > green. A
    channel at hue p (red 0, green 2, blue 4) is v - c x clamp(d - 1, 0, 1). Here d is the distance of the shifted hue from p
    on the circle: |d'| up to 3 and 6 - |d'| beyond, with d' = hue + shift - p.

    Args:
        levels: [N, 3, S, S].
        shifts: [N, 3]: shift - p of each channel, -3 to 3.
    """
    red, green, blue = levels.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    hue = (green + blue).sub_(red).sub_(value).div_(chroma.clamp(min=1e-6)).add_(2.0).copysign_(green - blue)
    way = (hue[:, None] + shifts[:, :, None, None]).abs_().sub_(3.0).abs_()  # 3 - d
    return way.clamp_(1.0, 2.0).mul_(chroma[:, None]).add_(value.sub_(chroma, alpha=2.0)[:, None])


def _blur(levels: Tensor, half_kernels: Tensor, positions: Tensor, axis: int) -> Tensor:
    """Blur views [N, 3, S, S] along one axis. A sum over distances gives equal bits in batches of any size."""
    size_px = levels.shape[axis]
    radius_px = (len(positions) - size_px) // 2
    weights = half_kernels[:, :, None, None, None]
    wider = levels.index_select(axis, positions)
    blurred = wider.narrow(axis, radius_px, size_px) * weights[:, 0]
    for distance in range(1, radius_px + 1):
        both = wider.narrow(axis, radius_px - distance, size_px) + wider.narrow(axis, radius_px + distance, size_px)
        blurred.addcmul_(both, weights[:, distance])
    return blurred


def _jitter(plan: ViewPlan) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return `Operations.matrices` and `Operations.mean_shares` of a plan, [V, B, ...]: factor x + (1 - factor) rest."""
    factors = np.stack([plan.brightness, plan.contrast, plan.saturation, np.ones_like(plan.brightness)], axis=-1)
    factors = np.where(plan.jitter[..., None], factors, np.float32(1.0))
    factors = np.take_along_axis(factors, plan.jitter_order.astype(np.int64), axis=-1)
    rest_of_matrix = np.where((plan.jitter_order == SATURATION)[..., None, None], _GREY, np.float32(0.0))
    shares = np.float32(1.0) - factors
    matrices = factors[..., None, None] * _EYE + shares[..., None, None] * rest_of_matrix
    return matrices.astype(np.float32), np.where(plan.jitter_order == CONTRAST, shares, np.float32(0.0))


def _hue_shifts(turns: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `Operations.hue_shifts` of a plan, [V, B, 3]."""
    beyond = 6.0 * turns[..., None].astype(np.float64) - np.array([0.0, 2.0, 4.0])
    return ((beyond + 3.0) % 6.0 - 3.0).astype(np.float32)


def _half_kernels(plan: ViewPlan, group: ViewGroupConfig) -> NDArray[np.float32]:
    """Return `Operations.half_kernels` of a plan, [V, B, R + 1]; R depends on the group alone."""
    transforms = [group.transform_of(view_index) for view_index in range(plan.num_views)]
    radius_px = largest_blur_radius_px(group)
    weights = np.zeros((*plan.blur_sigma_px.shape, radius_px + 1), np.float32)
    weights[..., 0] = 1.0
    for view_index, image_index in zip(*plan.blur_sigma_px.nonzero(), strict=True):
        sigma_px = float(plan.blur_sigma_px[view_index, image_index])
        kernel = gaussian_kernel(sigma_px, transforms[view_index].blur_kernel_px)
        half = kernel[len(kernel) // 2 :]
        weights[view_index, image_index, : len(half)] = half
    return weights
