"""What a run chose, and why: the analysis of a run's selection log.

Reads the Parquet files that `selection_log.py` writes, and compares chosen pairs with the others over time, predicts
which pair is chosen, and weighs what makes a pair hard. Plain arrays in, plain numbers out: no torch, no Ray.
`pipelines/analyse_selection.py` prints it, `selection_figures.py` draws it.

Legend: N logged images, V views per image, P pairs, F features of a pair.
Source: the HVP authors' analysis; definitions, and what differs, in `describe_features`.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvp_ray.errors import DataError
from hvp_ray.tracking.selection_log import selection_files
from hvp_ray.views.geometry import crop_iou

LOG_FORMAT = 1

FEATURES = (
    "iou",
    "corner_distance",
    "area_ratio",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "grayscale_differs",
    "blur_differs",
    "flip_differs",
    "solarize_differs",
)
"""What the models know of a pair; `brightness` to `hue` are absolute differences of both views' factors."""

MEASURES = (
    "iou",
    "corner_distance",
    "color_distance",
    "smaller_area",
    "larger_area",
    "grayscale_differs",
    "blur_differs",
    "flip_differs",
    "solarize_differs",
)
"""What is compared between chosen and other pairs; areas are fractions of the image, of the pair's two crops."""

AUTHORS_FANOVA = {
    "iou": 0.215,
    "brightness": 0.115,
    "corner_distance": 0.057,
    "hue": 0.048,
    "contrast": 0.036,
    "saturation": 0.016,
}
"""fANOVA importance for the similarity of the selected pair: SimSiam, ResNet-50, ImageNet, last of 100 epochs.

Source: automl/hvp, branch MSA/simsiam, analysis/fanova_plot.py and its plots.
"""

_MAX_MODEL_IMAGES = 20_000
_MAX_MODEL_PAIRS = 300_000
_MAX_FOREST_PAIRS = 36_000
_MIN_MODEL_IMAGES = 100
_ROWS_AT_ONCE = 8192
_FINE_BINS = 8
_IMAGES_PER_FINE_BIN = 100
_HISTOGRAM_BINS = 20
_RIDGE = 1e-4
_VIEW_COLUMNS: dict[str, Any] = {
    "top": np.int32,
    "left": np.int32,
    "height": np.int32,
    "width": np.int32,
    "flip": np.bool_,
    "jitter": np.bool_,
    "brightness": np.float32,
    "contrast": np.float32,
    "saturation": np.float32,
    "hue_turns": np.float32,
    "grayscale": np.bool_,
    "blur_sigma_px": np.float32,
    "solarize": np.bool_,
}
_IMAGE_COLUMNS: dict[str, Any] = {
    "step": np.int64,
    "epoch": np.int32,
    "sample_id": np.int64,
    "image_height": np.int32,
    "image_width": np.int32,
    "chosen_pair": np.int64,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionLog:
    """The logged selections of a run, in the order of the steps. [N] unless said otherwise; views are [N, V]."""

    run_name: str
    recipe: str
    rule: str
    seed: int
    steps_per_epoch: int
    pairs: NDArray[np.int64]
    """[P, 2], view indices."""
    num_images_left_out: int
    """Logged images with another number of views, or other pairs, than most."""

    step: NDArray[np.int64]
    """Optimizer steps done."""
    epoch: NDArray[np.int32]
    sample_id: NDArray[np.int64]
    image_height: NDArray[np.int32]
    """Px."""
    image_width: NDArray[np.int32]
    """Px."""
    chosen_pair: NDArray[np.int64]
    """Row of `pairs`."""
    scores: NDArray[np.float32]
    """[N, P], loss that each pair would give, higher is harder; NaN where the rule needed no scores."""

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue_turns: NDArray[np.float32]
    grayscale: NDArray[np.bool_]
    blur_sigma_px: NDArray[np.float32]
    solarize: NDArray[np.bool_]

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.step)

    @property
    def num_views(self) -> int:
        """V."""
        return int(self.top.shape[1])

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.pairs)

    def take(self, rows: NDArray[Any] | slice) -> "SelectionLog":
        """Return the log of some of the images."""
        names = [*_IMAGE_COLUMNS, "scores", *_VIEW_COLUMNS]
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """A measure of the chosen pairs against that of the other pairs of the same images."""

    chosen: float
    other: float
    standard_error: float | None
    """Of chosen minus other, over the images; None: one image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """The selections of some steps."""

    first_step: int
    last_step: int
    first_epoch: int
    last_epoch: int
    epochs_done: float
    """Mean of the steps over the steps of an epoch: where this period is drawn."""
    num_images: int
    min_iou_share: float
    """Share of the images whose chosen pair is the one with the smallest IoU; chance is 1/P."""
    measures: dict[str, Contrast]
    """By the names of `MEASURES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IouHistogram:
    """Shares of the pairs by IoU, in the last third of the logged steps; each column adds up to 1."""

    edges: tuple[float, ...]
    chosen_share: tuple[float, ...]
    other_share: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceFeature:
    """What a feature does in the choice model."""

    coefficient: float
    """Change of the log-odds for one standard deviation more of the feature; negative: less of it is chosen."""
    accuracy_lost: float
    """Held-out accuracy lost when the feature's values are shuffled among the pairs of each image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceModel:
    """How well the chosen pair can be told from the plan alone: see `fit_choice_model`."""

    num_fitted: int
    num_held_out: int
    accuracy: float
    """Share of held-out images whose chosen pair is the model's first."""
    min_iou_accuracy: float
    """The same of the rule "the pair with the smallest IoU"."""
    chance: float
    log_likelihood_share: float
    """McFadden's: 1 - log-likelihood / log-likelihood of chance, held out; 0 is chance, 1 is certainty."""
    features: dict[str, ChoiceFeature]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFeature:
    """What a feature does in the score model, as shares of a variance."""

    main_effect: float
    """Variance of the forest's marginal over the feature / variance of the forest: fANOVA's importance."""
    permutation: float
    """Held-out squared error gained by shuffling the feature / twice the variance of the scores (total effect)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreModel:
    """What makes a pair hard: see `fit_score_model`."""

    num_fitted: int
    num_held_out: int
    r2: float
    """Share of the variance of held-out scores (minus their image's mean) that the forest explains."""
    features: dict[str, ScoreFeature]


@dataclass(frozen=True, kw_only=True, slots=True)
class IouScoreCorrelation:
    """How IoU and score go together among the pairs of an image."""

    num_images: int
    pearson: float
    """Of both minus their image's mean, over all pairs."""
    spearman: float
    """Mean over the images of the rank correlation of their P pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionAnalysis:
    """What a run chose. The models, the histogram and the correlation look at the last third of the logged steps."""

    run_name: str
    recipe: str
    rule: str
    seed: int
    steps_per_epoch: int
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


def read_selection_log(run_dir: Path) -> SelectionLog:
    """Read the selection log of a run's folder.

    Where a resumed run logged steps again, the first record counts. Steps with another number of views, or other
    pairs, than most are left out and counted.

    Raises:
        DataError: no log, or a damaged one.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder; expected the folder of a run, such as runs/<name>")
    parts = [part for path in selection_files(run_dir) if (part := _read_part(path)) is not None]
    if not parts:
        raise DataError(
            f"{run_dir} has no selection log (log/*/selection-*.parquet): the run chose nothing (selection.rule=first), "
            "or tracking.selection_images_per_epoch is 0, or it has not come to its first logged step. Train with "
            "another rule and with tracking.selection_images_per_epoch above 0"
        )
    layouts: dict[tuple[int, bytes], list[SelectionLog]] = {}
    seen = np.zeros(0, np.int64)
    for part in parts:
        fresh = part.take(~np.isin(part.step, seen))
        seen = np.union1d(seen, part.step)
        layouts.setdefault((part.num_views, part.pairs.tobytes()), []).append(fresh)
    kept = max(layouts.values(), key=lambda logs: sum(log.num_images for log in logs))
    total = sum(log.num_images for logs in layouts.values() for log in logs)
    names = [*_IMAGE_COLUMNS, "scores", *_VIEW_COLUMNS]
    columns: dict[str, Any] = {name: np.concatenate([getattr(log, name) for log in kept]) for name in names}
    whole = dataclasses.replace(kept[0], **columns, num_images_left_out=total - len(columns["step"]))
    return whole.take(np.argsort(whole.step, kind="stable"))


def _read_part(path: Path) -> SelectionLog | None:
    """Return one file of the log; None: it has no rows."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as a selection log ({error}); delete this file to go without it"
        ) from error
    try:
        described = json.loads((table.schema.metadata or {})[b"hvp_ray"])
        if described["format"] != LOG_FORMAT:
            raise DataError(f"{path} has format {described['format']}; this version reads format {LOG_FORMAT}")
        if not table.num_rows:
            return None
        pairs = np.array(described["pairs"], np.int64).reshape(-1, 2)
        columns: dict[str, Any] = {
            name: table.column(name).to_numpy().astype(dtype) for name, dtype in _IMAGE_COLUMNS.items()
        }
        columns |= {name: _list_column(table, name, dtype) for name, dtype in _VIEW_COLUMNS.items()}
        columns["scores"] = _scores(table, len(pairs))
        log = SelectionLog(
            run_name=str(described["run_name"]),
            recipe=str(described["recipe"]),
            rule=str(described["rule"]),
            seed=int(described["seed"]),
            steps_per_epoch=int(described["steps_per_epoch"]),
            pairs=pairs,
            num_images_left_out=0,
            **columns,
        )
        if not (log.chosen_pair >= 0).all() or not (log.chosen_pair < len(pairs)).all() or pairs.max() >= log.num_views:
            raise ValueError(f"chosen_pair or pairs go beyond {len(pairs)} pairs of {log.num_views} views")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as a selection log ({error}); delete this file to go without it"
        ) from error
    return log


def _list_column(table: Any, name: str, dtype: Any) -> NDArray[Any]:
    """Return a column of lists of one length as [N, length]."""
    flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(dtype).reshape(table.num_rows, -1)


def _scores(table: Any, num_pairs: int) -> NDArray[np.float32]:
    column = table.column("scores")
    scores = np.full((table.num_rows, num_pairs), np.nan, np.float32)
    present = column.is_valid().to_numpy().astype(bool)
    if present.any():
        scores[present] = _list_column(table.filter(pa.array(present)), "scores", np.float32)
    return scores


def describe_features(log: SelectionLog) -> dict[str, NDArray[np.float32]]:
    """Return the `FEATURES` and `MEASURES` of every pair, each [N, P].

    - iou: of the crops, px of the original image.
    - corner_distance: Euclidean distance of the top-left corners / diagonal of the image.
    - area_ratio, smaller_area, larger_area: of the pair's crops; the latter two as fractions of the image.
    - brightness, contrast, saturation, hue: absolute differences of the factors; a view without jitter has neutral
      ones (1, 1, 1 and 0 turns).
    - color_distance: Euclidean, over the same four.
    - ..._differs: 1 where one view of the pair has it and the other has not.

    Source: automl/hvp, branch analysis, analysis/metric_json_to_csv.py and plot_relative_dist.py.
    Differs: the authors put factors 0 for missing jitter, so that any jittered view is far from it, and count a
        single difference as 0 if either view has no jitter; here a missing jitter is what it does: nothing.
    """
    first, second = log.pairs[:, 0], log.pairs[:, 1]

    def difference(values: NDArray[Any]) -> NDArray[np.float32]:
        wide = values.astype(np.float32)
        return np.abs(wide[:, first] - wide[:, second])

    diagonal = np.hypot(log.image_height, log.image_width).astype(np.float32)[:, None]
    image_area = log.image_height.astype(np.float64) * log.image_width
    areas = (log.height.astype(np.float64) * log.width / image_area[:, None]).astype(np.float32)
    smaller = np.minimum(areas[:, first], areas[:, second])
    larger = np.maximum(areas[:, first], areas[:, second])
    colors = {
        name: difference(np.where(log.jitter, getattr(log, field), neutral))
        for name, field, neutral in (
            ("brightness", "brightness", 1.0),
            ("contrast", "contrast", 1.0),
            ("saturation", "saturation", 1.0),
            ("hue", "hue_turns", 0.0),
        )
    }
    return {
        "iou": crop_iou(log.top.T, log.left.T, log.height.T, log.width.T, log.pairs),
        "corner_distance": np.hypot(difference(log.top), difference(log.left)) / diagonal,
        "area_ratio": smaller / larger,
        "smaller_area": smaller,
        "larger_area": larger,
        **colors,
        "color_distance": np.sqrt(np.stack([c**2 for c in colors.values()]).sum(axis=0)),
        "grayscale_differs": difference(log.grayscale),
        "blur_differs": difference(log.blur_sigma_px > 0),
        "flip_differs": difference(log.flip),
        "solarize_differs": difference(log.solarize),
    }


def analyse_selection(log: SelectionLog) -> SelectionAnalysis:
    """Compare the chosen pairs of a log with the others, and say what they were chosen for.

    Raises:
        DataError: one pair per image: there was nothing to choose.
    """
    if log.num_pairs < 2:
        raise DataError(
            f"the run {log.run_name} had {log.num_views} views and {log.num_pairs} pair per image, so nothing was "
            "chosen; train with selection.num_views of 3 or more"
        )
    chosen, other, is_min_iou = _contrast_rows(log)

    def period(rows: NDArray[np.bool_]) -> Period:
        return _period(log, chosen, other, is_min_iou, np.flatnonzero(rows))

    epochs = np.unique(log.epoch)
    late_from = int(log.step[-1]) - (int(log.step[-1]) - int(log.step[0])) / 3
    late_rows = np.flatnonzero(log.step >= late_from)
    late = log.take(late_rows)
    sample = _subsample(late, min(_MAX_MODEL_IMAGES, _MAX_MODEL_PAIRS // log.num_pairs))
    scored = sample.take(np.flatnonzero(np.isfinite(sample.scores).all(axis=1)))
    return SelectionAnalysis(
        run_name=log.run_name,
        recipe=log.recipe,
        rule=log.rule,
        seed=log.seed,
        steps_per_epoch=log.steps_per_epoch,
        num_views=log.num_views,
        pairs=tuple((m, n) for m, n in log.pairs.tolist()),
        num_images=log.num_images,
        num_images_left_out=log.num_images_left_out,
        chance=1 / log.num_pairs,
        pair_shares=tuple((np.bincount(log.chosen_pair, minlength=log.num_pairs) / log.num_images).tolist()),
        whole_run=period(np.ones(log.num_images, np.bool_)),
        last_third=_period(log, chosen, other, is_min_iou, late_rows),
        per_epoch=tuple(period(log.epoch == epoch) for epoch in epochs),
        first_epoch=tuple(
            period((log.epoch == epochs[0]) & (first <= log.step) & (log.step <= last))
            for first, last in _fine_bins(log.step[log.epoch == epochs[0]])
        ),
        iou_histogram=_iou_histogram(late),
        choice_model=fit_choice_model(sample) if sample.num_images >= _MIN_MODEL_IMAGES else None,
        score_model=fit_score_model(scored) if scored.num_images >= _MIN_MODEL_IMAGES else None,
        iou_score_correlation=_correlate(scored) if scored.num_images else None,
    )


def _in_blocks(log: SelectionLog) -> Iterator[SelectionLog]:
    for start in range(0, log.num_images, _ROWS_AT_ONCE):
        yield log.take(slice(start, start + _ROWS_AT_ONCE))


def _subsample(log: SelectionLog, limit: int) -> SelectionLog:
    if log.num_images <= limit:
        return log
    return log.take(np.sort(np.random.default_rng(0).permutation(log.num_images)[:limit]))


def _contrast_rows(
    log: SelectionLog,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return `MEASURES` of the chosen pair, and their mean over the others, [N, M] each; [N] chosen has least IoU."""
    chosen, other, is_min_iou = [], [], []
    for block in _in_blocks(log):
        features = describe_features(block)
        values = np.stack([features[name] for name in MEASURES], axis=-1).astype(np.float64)
        of_chosen = values[np.arange(block.num_images), block.chosen_pair]
        chosen.append(of_chosen)
        other.append((values.sum(axis=1) - of_chosen) / (log.num_pairs - 1))
        is_min_iou.append(features["iou"].argmin(axis=1) == block.chosen_pair)
    return np.concatenate(chosen), np.concatenate(other), np.concatenate(is_min_iou)


def _period(
    log: SelectionLog,
    chosen: NDArray[np.float64],
    other: NDArray[np.float64],
    is_min_iou: NDArray[np.bool_],
    rows: NDArray[np.int64],
) -> Period:
    steps, epochs, count = log.step[rows], log.epoch[rows], len(rows)
    errors = (chosen[rows] - other[rows]).std(axis=0, ddof=1) / count**0.5 if count > 1 else None
    return Period(
        first_step=int(steps.min()),
        last_step=int(steps.max()),
        first_epoch=int(epochs.min()),
        last_epoch=int(epochs.max()),
        epochs_done=float(steps.mean() / log.steps_per_epoch),
        num_images=count,
        min_iou_share=float(is_min_iou[rows].mean()),
        measures={
            name: Contrast(
                chosen=float(chosen[rows, column].mean()),
                other=float(other[rows, column].mean()),
                standard_error=None if errors is None else float(errors[column]),
            )
            for column, name in enumerate(MEASURES)
        },
    )


def _fine_bins(steps: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the first and last steps of up to eight parts, of some hundred images each."""
    distinct = np.unique(steps)
    count = max(1, min(_FINE_BINS, len(distinct), len(steps) // _IMAGES_PER_FINE_BIN))
    return [(int(part[0]), int(part[-1])) for part in np.array_split(distinct, count)]


def _iou_histogram(log: SelectionLog) -> IouHistogram:
    edges = np.linspace(0.0, 1.0, _HISTOGRAM_BINS + 1)
    counts = np.zeros((2, _HISTOGRAM_BINS))
    for block in _in_blocks(log):
        ious = describe_features(block)["iou"]
        is_chosen = np.arange(log.num_pairs) == block.chosen_pair[:, None]
        counts += [np.histogram(ious[is_chosen], edges)[0], np.histogram(ious[~is_chosen], edges)[0]]
    shares = counts / counts.sum(axis=1, keepdims=True)
    return IouHistogram(
        edges=tuple(edges.round(6).tolist()),
        chosen_share=tuple(shares[0].tolist()),
        other_share=tuple(shares[1].tolist()),
    )


def _feature_array(log: SelectionLog) -> NDArray[np.float64]:
    """Return `FEATURES`, [N, P, F]."""
    features = describe_features(log)
    return np.stack([features[name] for name in FEATURES], axis=-1).astype(np.float64)


def _halves(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def fit_choice_model(log: SelectionLog) -> ChoiceModel:
    """Fit a conditional choice model to half of the images, and measure it on the other half.

    P(pair p is chosen) = softmax over the image's pairs of w . x_p, x the standardised `FEATURES`; w maximises the
    likelihood, with a ridge of 1e-4 that keeps it finite where the choice is certain. A feature that is the same for
    all pairs has weight 0.

    Source: McFadden 1974 (conditional logit).
    Differs: the HVP authors trained boosted trees on all six pairs' parameters at once (accuracy 0.41, chance 0.167).
    """
    features, (train, test) = _feature_array(log), _halves(log.num_images)
    spread = features[train].std(axis=(0, 1))
    features = (features - features[train].mean(axis=(0, 1))) / np.where(spread > 1e-9, spread, np.inf)
    weights = _maximise_choice_likelihood(features[train], log.chosen_pair[train])
    held_out, chosen = features[test], log.chosen_pair[test]

    def accuracy(values: NDArray[np.float64]) -> float:
        return float(((values @ weights).argmax(axis=1) == chosen).mean())

    whole, generator, found = accuracy(held_out), np.random.default_rng(1), {}
    for column, name in enumerate(FEATURES):
        shuffled = held_out.copy()
        shuffled[..., column] = generator.permuted(held_out[..., column], axis=1)
        found[name] = ChoiceFeature(coefficient=float(weights[column]), accuracy_lost=float(whole - accuracy(shuffled)))
    log_probabilities = _log_softmax(held_out @ weights)[np.arange(len(test)), chosen]
    return ChoiceModel(
        num_fitted=len(train),
        num_held_out=len(test),
        accuracy=whole,
        min_iou_accuracy=float((held_out[..., FEATURES.index("iou")].argmin(axis=1) == chosen).mean()),
        chance=1 / log.num_pairs,
        log_likelihood_share=float(1 + log_probabilities.mean() / np.log(log.num_pairs)),
        features=found,
    )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _maximise_choice_likelihood(features_NPF: NDArray[np.float64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the weights [F] of the conditional logit, by Newton's method with halved steps."""
    count, _, num_features = features_NPF.shape
    rows = np.arange(count)
    of_chosen = features_NPF[rows, chosen]

    def loss(weights: NDArray[np.float64]) -> float:
        likelihood = _log_softmax(features_NPF @ weights)[rows, chosen].mean()
        return float(_RIDGE / 2 * weights @ weights - likelihood)

    weights = np.zeros(num_features)
    value = loss(weights)
    for _ in range(50):
        probabilities = np.exp(_log_softmax(features_NPF @ weights))
        mean = np.einsum("np,npf->nf", probabilities, features_NPF)
        gradient = (mean - of_chosen).mean(axis=0) + _RIDGE * weights
        spread = ((features_NPF - mean[:, None]) * np.sqrt(probabilities)[..., None]).reshape(-1, num_features)
        hessian = spread.T @ spread / count + _RIDGE * np.eye(num_features)
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        while scale > 1e-6 and loss(weights - scale * step) > value:
            scale /= 2
        weights = weights - scale * step
        previous, value = value, loss(weights)
        if previous - value < 1e-9:
            break
    return weights


def fit_score_model(log: SelectionLog) -> ScoreModel | None:
    """Fit a random forest to the scores of half of the images, and weigh its features on the other half.

    The forest predicts a pair's score minus the mean of its image's pairs, so that how hard an image is plays no part.
    Two importances of each feature, both shares of a variance:

    - main_effect: variance over the feature's values of the forest's prediction averaged over all other features,
      divided by the variance of the forest's predictions. This is fANOVA's importance of a single parameter, over the
      distribution of the logged pairs.
    - permutation: (squared error with the feature shuffled among all held-out pairs - squared error) / (2 x variance
      of the scores). It counts what the feature does together with others too.

    None: the scores are all equal.

    Source: Hutter, Hoos, Leyton-Brown, ICML 2014 (fANOVA).
    Differs: the HVP authors' forest predicts the similarity of the selected pair alone (`AUTHORS_FANOVA`), not of all
        pairs, and its importances are over the box of the parameters.
    """
    from sklearn.ensemble import RandomForestRegressor

    log = _subsample(log, max(_MIN_MODEL_IMAGES, _MAX_FOREST_PAIRS // log.num_pairs))
    features, (train, test) = _feature_array(log), _halves(log.num_images)
    scores = log.scores.astype(np.float64)
    scores -= scores.mean(axis=1, keepdims=True)
    if scores[train].std() < 1e-9 or scores[test].std() < 1e-9:
        return None
    fitted, held_out = (features[half].reshape(-1, len(FEATURES)) for half in (train, test))
    target = scores[test].ravel()
    forest = RandomForestRegressor(n_estimators=50, min_samples_leaf=20, max_features=0.5, random_state=0, n_jobs=1)
    forest.fit(fitted, scores[train].ravel())
    predicted = forest.predict(held_out)
    error, variance = float(((predicted - target) ** 2).mean()), float(target.var())
    generator, found = np.random.default_rng(2), {}
    background = held_out[generator.permutation(len(held_out))[:256]]
    for column, name in enumerate(FEATURES):
        shuffled = held_out.copy()
        shuffled[:, column] = generator.permutation(held_out[:, column])
        gained = float(((forest.predict(shuffled) - target) ** 2).mean()) - error
        marginal_variance = _marginal_variance(forest, held_out[:, column], background, column)
        found[name] = ScoreFeature(
            main_effect=marginal_variance / max(float(predicted.var()), 1e-12), permutation=gained / (2 * variance)
        )
    return ScoreModel(num_fitted=len(train), num_held_out=len(test), r2=1 - error / variance, features=found)


def _marginal_variance(
    forest: Any, values: NDArray[np.float64], background: NDArray[np.float64], column: int, num_levels: int = 16
) -> float:
    """Return the variance of the forest's marginal over one feature, over the distribution of its `values`."""
    levels, counts = np.unique(values, return_counts=True)
    if len(levels) > num_levels:
        levels = np.quantile(values, (np.arange(num_levels) + 0.5) / num_levels)
        counts = np.ones(num_levels, np.int64)
    if len(levels) == 1:
        return 0.0
    grid = np.tile(background, (len(levels), 1))
    grid[:, column] = levels.repeat(len(background))
    marginal = forest.predict(grid).reshape(len(levels), -1).mean(axis=1)
    mean = np.average(marginal, weights=counts)
    return float(np.average((marginal - mean) ** 2, weights=counts))


def _correlate(log: SelectionLog) -> IouScoreCorrelation | None:
    ious, scores = describe_features(log)["iou"].astype(np.float64), log.scores.astype(np.float64)
    pearson = _correlations(ious.reshape(1, -1), scores.reshape(1, -1), groups=log.num_pairs)
    spearman = _correlations(_ranks(ious), _ranks(scores), groups=log.num_pairs)
    if not len(pearson) or not len(spearman):
        return None
    return IouScoreCorrelation(
        num_images=log.num_images, pearson=float(pearson.mean()), spearman=float(spearman.mean())
    )


def _correlations(first: NDArray[np.float64], second: NDArray[np.float64], *, groups: int) -> NDArray[np.float64]:
    """Return the correlation of each row, of values minus the mean of their group; rows without spread are left out."""
    a, b = (
        (values.reshape(-1, groups) - values.reshape(-1, groups).mean(axis=1, keepdims=True)).reshape(values.shape)
        for values in (first, second)
    )
    spread = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return (a * b).sum(axis=1)[spread > 1e-12] / spread[spread > 1e-12]


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ranks in each row; equal values share the mean of theirs."""
    ranks = np.zeros(values.shape)
    for column in range(values.shape[1]):
        other = values[:, column : column + 1]
        ranks += (other < values) + 0.5 * (other == values)
    return ranks
