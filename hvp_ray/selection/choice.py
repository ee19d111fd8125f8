"""Choose one candidate per image, and gather its views. Pure tensors; no gradient; no copy from device to host.

Legend: V views, B images, P pairs, S slots (2: the pair; V with rule all_pairs), C channels, H, W pixels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from hvp_ray.config import Rule
from hvp_ray.errors import ShapeError
from hvp_ray.selection.candidates import pair_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What is trained on."""

    pair_indices: Int64[Tensor, " batch"] | None
    """Row of `pair_table` chosen for each image; None with all_pairs."""
    view_indices: Int64[Tensor, "slots batch"]
    """Views trained on."""


def choose_pairs(
    rule: Rule,
    *,
    num_views: int,
    num_images: int,
    device: torch.device,
    scores_BP: Float[Tensor, "batch pairs"] | None = None,
    iou_BP: Float[Tensor, "batch pairs"] | None = None,
    random_pairs: Int64[Tensor, " batch"] | None = None,
) -> Selection:
    """Choose the views to train on by `rule`; ties go to the lowest pair.

    Args:
        rule: see `hvp_ray.config.Rule`.
        num_views: V.
        num_images: B.
        device: where the indices shall lie.
        scores_BP: loss that each pair would give, higher is harder; needed by hardest and easiest.
        iou_BP: overlap of the crops; needed by min_iou.
        random_pairs: pair drawn for each image; needed by random.

    Raises:
        ShapeError: what the rule needs is missing or has another shape.
    """
    if rule == "all_pairs":
        views = torch.arange(num_views, device=device)[:, None].expand(num_views, num_images)
        return Selection(pair_indices=None, view_indices=views.contiguous())
    match rule:
        case "hardest":
            chosen = _check(scores_BP, "scores_BP", num_views, num_images).argmax(dim=1)
        case "easiest":
            chosen = _check(scores_BP, "scores_BP", num_views, num_images).argmin(dim=1)
        case "min_iou":
            chosen = _check(iou_BP, "iou_BP", num_views, num_images).argmin(dim=1)
        case "random":
            if random_pairs is None or random_pairs.shape != (num_images,):
                raise ShapeError(f"random_pairs must have shape [{num_images}], got {random_pairs!r}")
            chosen = random_pairs
        case "first":
            chosen = torch.zeros(num_images, dtype=torch.int64, device=device)
    table = torch.from_numpy(pair_table(num_views)).to(device)
    chosen = chosen.to(device)
    return Selection(pair_indices=chosen, view_indices=table[chosen].T.contiguous())


def _check(values_BP: Tensor | None, name: str, num_views: int, num_images: int) -> Tensor:
    expected = (num_images, num_views * (num_views - 1) // 2)
    if values_BP is None or tuple(values_BP.shape) != expected:
        found = None if values_BP is None else tuple(values_BP.shape)
        raise ShapeError(f"{name} must have shape [B, P] = {expected}, got {found}")
    return values_BP


def gather_views(
    pixels_VB: UInt8[Tensor, "views batch height width channels"], view_indices: Int64[Tensor, "slots batch"]
) -> UInt8[Tensor, "slots batch height width channels"]:
    """Gather the chosen views by one index: out[s, b] = pixels[view_indices[s, b], b]."""
    batch = torch.arange(pixels_VB.shape[1], device=pixels_VB.device)
    return pixels_VB[view_indices, batch]
