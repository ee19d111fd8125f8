"""Proposals: choose a hard pair among many plans of an image before anything is rendered.

Many plans are drawn for each image. A linear model predicts from two plans how hard their pair is, and only the chosen pair
is rendered. The model is a ridge regression, updated by probes: every few steps all pairs of a few images are scored.
View workers choose (`choose_plans`), trainers learn (`HardnessPredictor`).

Views are chosen with correctly rounded operations alone (+, -, *, /, sqrt), so the choice has equal bits on every CPU.

Legend: V plans of each image, B images, P pairs, F features.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.config import SelectionConfig
from hvp_ray.records import Proposal, ViewPlan
from hvp_ray.selection.candidates import pair_table
from hvp_ray.selection.rules import RULES
from hvp_ray.selection.step_selection import StepSelection
from hvp_ray.views.geometry import crop_iou

_COLORS = ("brightness", "contrast", "saturation", "hue")

FEATURES = (
    "iou",
    "iou_squared",
    "contained",
    "distance",
    "distance_squared",
    "side_sum",
    "side_difference",
    "side_ratio",
    "aspect_difference",
    "aspect_sum",
    *(f"{color}_{term}" for color in _COLORS for term in ("difference", "sum", "product")),
    "gray_differs",
    "gray_both",
    "jitter_differs",
    "blur_difference",
    "blur_sum",
    "solarize_differs",
    "solarize_both",
    "flip_differs",
)
"""Features of a pair, symmetric in its views; all are of the order of 1."""

_FORGETTING = 0.98
"""Weight of earlier probes at each new one: about 50 probes count. (R2 changed by less than 0.01 from 0.95 to 1, and with a
penalty from 1 to 16: SimCLR, CIFAR-10.)"""

_RIDGE = 4.0
"""Penalty of a squared coefficient, in the squared error of one pair whose hardness has standard deviation 1."""


def pair_features(
    plan: ViewPlan, heights: NDArray[np.int32], widths: NDArray[np.int32], pairs: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the `FEATURES` of every pair, [F, P, B].

    Sides are square roots of the crops' share of the image, distances are those of the crops' centres in diagonals of the
    image, aspects are (width - height) / (width + height). Colours are deviations from the neutral factor (hue: in tenths of
    a turn); grey views have no saturation and no hue. Blur sigmas are in units of 2 px.

    Args:
        plan: plan of the V views.
        heights, widths: [B], px of the original images.
        pairs: [P, 2], view indices.
    """
    values = [*_crop_features(plan, heights, widths, pairs), *_operation_features(plan, pairs)]
    return np.stack(values, dtype=np.float64)


def _crop_features(
    plan: ViewPlan, heights: NDArray[np.int32], widths: NDArray[np.int32], pairs: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    first, second = pairs[:, 0], pairs[:, 1]
    top, left, height, width = (v.astype(np.float64) for v in (plan.top, plan.left, plan.height, plan.width))
    image_h, image_w = heights.astype(np.float64), widths.astype(np.float64)
    iou = crop_iou(plan.top, plan.left, plan.height, plan.width, pairs).T.astype(np.float64)
    area = height * width
    smaller = np.minimum(area[first], area[second])
    center_y, center_x = top + height / 2, left + width / 2
    distance_squared = ((center_y[first] - center_y[second]) ** 2 + (center_x[first] - center_x[second]) ** 2) / (
        image_h**2 + image_w**2
    )
    side = np.sqrt(area / (image_h * image_w))
    aspect = (width - height) / (width + height)
    return [
        iou,
        iou * iou,
        iou * (area[first] + area[second]) / (1.0 + iou) / smaller,
        np.sqrt(distance_squared),
        distance_squared,
        side[first] + side[second],
        np.abs(side[first] - side[second]),
        np.minimum(side[first], side[second]) / np.maximum(side[first], side[second]),
        np.abs(aspect[first] - aspect[second]),
        np.abs(aspect[first]) + np.abs(aspect[second]),
    ]


def _operation_features(plan: ViewPlan, pairs: NDArray[np.int64]) -> list[NDArray[Any]]:
    first, second = pairs[:, 0], pairs[:, 1]
    colored = ~plan.grayscale
    colors = (
        plan.brightness - 1.0,
        plan.contrast - 1.0,
        (plan.saturation - 1.0) * colored,
        plan.hue_turns * 10.0 * colored,
    )
    values: list[NDArray[Any]] = []
    for color in (of_color.astype(np.float64) for of_color in colors):
        values += [
            np.abs(color[first] - color[second]),
            color[first] + color[second],
            color[first] * color[second],
        ]
    blur = plan.blur_sigma_px.astype(np.float64) / 2.0
    return [
        *values,
        plan.grayscale[first] != plan.grayscale[second],
        plan.grayscale[first] & plan.grayscale[second],
        plan.jitter[first] != plan.jitter[second],
        np.abs(blur[first] - blur[second]),
        blur[first] + blur[second],
        plan.solarize[first] != plan.solarize[second],
        plan.solarize[first] & plan.solarize[second],
        plan.flip[first] != plan.flip[second],
    ]


def choose_plans(
    plan: ViewPlan,
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    proposal: Proposal,
    *,
    alternating: bool,
) -> NDArray[np.int64]:
    """Return which two plans of each image are rendered, [2, B]; ties go to the lowest pair.

    Args:
        plan: [V, B].
        heights, widths: [B], px of the original images.
        proposal: how they are chosen.
        alternating: see `pair_table`.
    """
    pairs = pair_table(plan.num_views, alternating=alternating)
    hardness_PB = np.zeros((len(pairs), plan.num_images))
    for coefficient, feature_PB in zip(proposal.coefficients, pair_features(plan, heights, widths, pairs), strict=True):
        hardness_PB += coefficient * feature_PB  # no matrix product, whose summation order depends on the CPU
    place = round((1.0 - proposal.quantile) * (len(pairs) - 1))
    chosen = np.argsort(-hardness_PB, axis=0, kind="stable")[place]
    return np.ascontiguousarray(pairs[chosen].T)


def probe_statistics(
    features_FPB: Float[Tensor, "features pairs batch"], scores_BP: Float[Tensor, "batch pairs"]
) -> Float[Tensor, " statistics"]:
    """Return what a regression learns from scored pairs: X^T X, X^T y, y^T y and the length of y in one tensor, float64.

    X and y are centred within each image, because the predictor only has to order the pairs of an image.
    """
    inputs_NF = (features_FPB - features_FPB.mean(dim=1, keepdim=True)).flatten(1).T
    scores_PB = scores_BP.T.double()
    targets_N = (scores_PB - scores_PB.mean(dim=0)).flatten()
    products, moments, squares = inputs_NF.T @ inputs_NF, inputs_NF.T @ targets_N, targets_N @ targets_N
    return torch.cat([products.flatten(), moments, squares[None], squares.new_tensor([len(targets_N)])])


def proposal_for(
    selection: SelectionConfig, of_step: StepSelection, coefficients: NDArray[np.float64] | None
) -> Proposal | None:
    """Return how the views of a step are chosen before they are rendered; None: the first plans are rendered."""
    if not RULES[of_step.rule].chooses_before_rendering or coefficients is None:
        return None
    return Proposal(num_plans=selection.num_plans, coefficients=coefficients, quantile=of_step.quantile)


class HardnessPredictor:
    """Learns what makes a pair hard; equal on all ranks, because it learns from means over the ranks.

    After k steps it has coefficients c_k. Step t is requested with c_(t - delay + 1), whatever has been learned since. So its
    views depend neither on how many batches are in flight nor on when a run was resumed. The last `delay` of the c_k are
    part of the state.

    Args:
        delay: `selection.predictor_delay`, more than the batches in flight.
        steps_done: steps of the run so far.
        state: `state()` after that step; empty: nothing was learned.
    """

    def __init__(self, *, delay: int, steps_done: int = 0, state: dict[str, Tensor] | None = None) -> None:
        num_features = len(FEATURES)
        self._products = np.zeros((num_features, num_features))
        self._moments = np.zeros(num_features)
        self._errors = np.zeros(2)  # squared targets, and what the predictions explained of them
        history = (np.zeros(num_features),) * delay
        if state:
            self._products, self._moments, self._errors = (
                state[name].numpy().copy() for name in ("products", "moments", "errors")
            )
            history = (*history, *state["history"].numpy().copy())[-delay:]
        self._learned = steps_done, history
        """Steps so far, and the last coefficients, the newest last. Replaced at once: a stream reads it in its own thread."""

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        arrays = {"products": self._products, "moments": self._moments, "errors": self._errors}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | {
            "history": torch.from_numpy(np.stack(self._learned[1]))
        }

    def coefficients_of(self, step: int) -> NDArray[np.float64] | None:
        """Return the coefficients that step `step` is requested with; None: nothing was learned by then."""
        steps_done, history = self._learned
        age = steps_done - (step - len(history) + 1)
        assert 0 <= age < len(history), "steps are requested in order, fewer than the delay ahead"
        coefficients = history[-1 - age]
        return coefficients if coefficients.any() else None

    def end_step(self, statistics: NDArray[np.float64] | None) -> None:
        """Count a step, and learn from its probe.

        Args:
            statistics: `probe_statistics` as the mean over all ranks; None: the step had no probe.
        """
        steps_done, history = self._learned
        coefficients = history[-1]
        if statistics is not None and np.isfinite(statistics).all() and statistics[-2] > 0.0:
            coefficients = self._learn(statistics, coefficients)
        self._learned = steps_done + 1, (*history[1:], coefficients)

    @property
    def r2(self) -> float:
        """Share of the variance within images that the predictions explained on recent probes, before learning from them."""
        squares, explained = self._errors.tolist()
        return explained / squares if squares else 0.0

    def _learn(self, statistics: NDArray[np.float64], coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return new coefficients; hardness is in standard deviations within images, as the scale of losses changes."""
        num_features = len(FEATURES)
        products, moments, (squares, count) = np.split(statistics, [num_features**2, num_features**2 + num_features])
        products, moments = products.reshape(num_features, num_features), moments * np.sqrt(count / squares)
        explained = 2.0 * (coefficients @ moments) - coefficients @ products @ coefficients
        self._errors = _FORGETTING * self._errors + (count, explained)
        self._products = _FORGETTING * self._products + products
        self._moments = _FORGETTING * self._moments + moments
        penalised = self._products + _RIDGE * np.eye(num_features)
        return np.asarray(np.linalg.solve(penalised, self._moments), np.float64)
