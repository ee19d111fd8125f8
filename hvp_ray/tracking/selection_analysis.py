"""The analysis of a run's selection log: which pairs were chosen, and what makes a pair hard.

It compares chosen pairs with the others over time, predicts which pair is chosen, and weighs the features of a pair.
`hvp-ray analyse` prints the result, `selection_figures.py` draws it. No torch, no Ray.

Source: the HVP authors' analysis; for definitions and differences, see `logged_pairs.pair_features`.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from hvp_ray.errors import DataError
from hvp_ray.tracking.logged_pairs import MEASURES, LoggedRun, SelectionLog, pair_features
from hvp_ray.tracking.selection_models import (
    MIN_IMAGES,
    ChoiceModel,
    IouScoreCorrelation,
    ScoreModel,
    correlate_iou_and_score,
    fit_choice_model,
    fit_score_model,
)

_MAX_MODEL_IMAGES = 20_000
_MAX_MODEL_PAIRS = 300_000
_ROWS_AT_ONCE = 8192
_FINE_BINS = 8
_IMAGES_PER_FINE_BIN = 100
_HISTOGRAM_BINS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """A measure of the chosen pairs and of the other pairs of the same images."""

    chosen: float
    other: float
    standard_error: float | None
    """Standard error of chosen minus other, over the images; None: one image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """The selections of a range of steps."""

    first_step: int
    last_step: int
    first_epoch: int
    last_epoch: int
    epochs_done: float
    """Mean step / steps of an epoch: the place of this period on a time axis."""
    num_images: int
    min_iou_share: float
    """Fraction of the images whose chosen pair has the smallest IoU; chance is 1/P."""
    measures: dict[str, Contrast]
    """Measures, by the names of `MEASURES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IouHistogram:
    """Fractions of the pairs by IoU, in the last third of the logged steps; each column adds up to 1."""

    edges: tuple[float, ...]
    chosen_share: tuple[float, ...]
    other_share: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionAnalysis(LoggedRun):
    """The choices of a run. Models, histogram and correlation cover the last third of the logged steps."""

    num_views: int
    pairs: tuple[tuple[int, int], ...]
    num_images: int
    num_images_left_out: int
    chance: float
    """1/P."""
    pair_shares: tuple[float, ...]
    """How often each row of `pairs` was chosen."""
    whole_run: Period
    last_third: Period
    per_epoch: tuple[Period, ...]
    first_epoch: tuple[Period, ...]
    """The first logged epoch in up to eight parts."""
    iou_histogram: IouHistogram
    choice_model: ChoiceModel | None
    """None: fewer than 100 images."""
    score_model: ScoreModel | None
    """None: fewer than 100 images with scores, or scores that are all equal."""
    iou_score_correlation: IouScoreCorrelation | None
    """None: no scores, or scores that are all equal."""

    def to_dict(self) -> dict[str, Any]:
        """Return the analysis as plain Python values."""
        return dataclasses.asdict(self)


def analyse_selection(log: SelectionLog) -> SelectionAnalysis:
    """Compare the chosen pairs of a log with the others, and find what they were chosen for.

    Raises:
        DataError: nothing was chosen: there is one pair per image, or all logged steps are random ones.
    """
    if log.num_pairs < 2:
        raise DataError(
            f"the run {log.run_name} had {log.num_views} views and {log.num_pairs} pair per image, so nothing was "
            "chosen; train with selection.num_views of 3 or more"
        )
    log = log.take(np.flatnonzero(log["has_choice"]))
    if not log.num_images:
        raise DataError(
            f"the run {log.run_name} has logged random steps only, so nothing was chosen; continue it past "
            f"selection.start_fraction"
        )
    step, epoch, contrasts = log["step"], log["epoch"], _contrast(log)
    epochs = np.unique(epoch)
    is_late = step >= step[-1] - (step[-1] - step[0]) / 3
    late = log.take(np.flatnonzero(is_late))
    sample = late.sample(min(_MAX_MODEL_IMAGES, _MAX_MODEL_PAIRS // log.num_pairs))
    scored = sample.take(np.flatnonzero(np.isfinite(sample["scores"]).all(axis=1)))
    in_first_epoch = np.unique(step[epoch == epochs[0]])
    num_bins = min(_FINE_BINS, len(in_first_epoch), (epoch == epochs[0]).sum() // _IMAGES_PER_FINE_BIN)
    fine_bins = np.array_split(in_first_epoch, max(1, num_bins))
    return SelectionAnalysis(
        **{field.name: getattr(log, field.name) for field in dataclasses.fields(LoggedRun)},
        num_views=log.num_views,
        pairs=tuple((m, n) for m, n in log.pairs.tolist()),
        num_images=log.num_images,
        num_images_left_out=log.num_images_left_out,
        chance=1 / log.num_pairs,
        pair_shares=tuple((np.bincount(log["chosen_pair"], minlength=log.num_pairs) / log.num_images).tolist()),
        whole_run=_period(log, contrasts, np.ones(log.num_images, np.bool_)),
        last_third=_period(log, contrasts, is_late),
        per_epoch=tuple(_period(log, contrasts, epoch == one) for one in epochs),
        first_epoch=tuple(_period(log, contrasts, (epoch == epochs[0]) & np.isin(step, steps)) for steps in fine_bins),
        iou_histogram=_iou_histogram(late),
        choice_model=fit_choice_model(sample) if sample.num_images >= MIN_IMAGES else None,
        score_model=fit_score_model(scored) if scored.num_images >= MIN_IMAGES else None,
        iou_score_correlation=correlate_iou_and_score(scored) if scored.num_images else None,
    )


def _in_blocks(log: SelectionLog) -> Iterator[SelectionLog]:
    for start in range(0, log.num_images, _ROWS_AT_ONCE):
        yield dataclasses.replace(log, images=log.images.slice(start, _ROWS_AT_ONCE))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Contrasts:
    """The measures of every image."""

    chosen: NDArray[np.float64]
    """[N, M] for the names of `MEASURES`: of the chosen pair."""
    other: NDArray[np.float64]
    """[N, M]: mean over the other pairs."""
    is_min_iou: NDArray[np.bool_]
    """[N]: the chosen pair has the smallest IoU."""


def _contrast(log: SelectionLog) -> _Contrasts:
    chosen, other, is_min_iou = [], [], []
    for block in _in_blocks(log):
        features, chosen_pair = pair_features(block), block["chosen_pair"]
        values = np.stack([features[name] for name in MEASURES], axis=-1).astype(np.float64)
        of_chosen = values[np.arange(block.num_images), chosen_pair]
        chosen.append(of_chosen)
        other.append((values.sum(axis=1) - of_chosen) / (log.num_pairs - 1))
        is_min_iou.append(features["iou"].argmin(axis=1) == chosen_pair)
    return _Contrasts(chosen=np.concatenate(chosen), other=np.concatenate(other), is_min_iou=np.concatenate(is_min_iou))


def _period(log: SelectionLog, contrasts: _Contrasts, rows: NDArray[np.bool_]) -> Period:
    steps, epochs, count = log["step"][rows], log["epoch"][rows], int(rows.sum())
    chosen, other = contrasts.chosen[rows], contrasts.other[rows]
    errors = scipy.stats.sem(chosen - other, axis=0).tolist() if count > 1 else [None] * len(MEASURES)
    means = zip(MEASURES, chosen.mean(axis=0).tolist(), other.mean(axis=0).tolist(), errors, strict=True)
    return Period(
        first_step=int(steps.min()),
        last_step=int(steps.max()),
        first_epoch=int(epochs.min()),
        last_epoch=int(epochs.max()),
        epochs_done=float(steps.mean() / log.steps_per_epoch),
        num_images=count,
        min_iou_share=float(contrasts.is_min_iou[rows].mean()),
        measures={name: Contrast(chosen=c, other=o, standard_error=error) for name, c, o, error in means},
    )


def _iou_histogram(log: SelectionLog) -> IouHistogram:
    edges = np.linspace(0.0, 1.0, _HISTOGRAM_BINS + 1)
    counts = np.zeros((2, _HISTOGRAM_BINS))
    for block in _in_blocks(log):
        ious = pair_features(block)["iou"]
        is_chosen = np.arange(log.num_pairs) == block["chosen_pair"][:, None]
        counts += [np.histogram(ious[is_chosen], edges)[0], np.histogram(ious[~is_chosen], edges)[0]]
    shares = counts / counts.sum(axis=1, keepdims=True)
    return IouHistogram(
        edges=tuple(edges.round(6).tolist()),
        chosen_share=tuple(shares[0].tolist()),
        other_share=tuple(shares[1].tolist()),
    )
