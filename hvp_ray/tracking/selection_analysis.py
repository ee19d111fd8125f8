"""The analysis of a run's selection log: which pairs were chosen, and what makes a pair hard.

It compares chosen pairs with the others over time, predicts which pair is chosen, and weighs the features of a pair.
`pipelines/analyse_selection.py` prints the result, `selection_figures.py` draws it. No torch, no Ray.

Legend: N logged images, V views per image, P pairs, F features of a pair.
Source: the HVP authors' analysis; for definitions and differences, see `describe_features`.
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
import scipy.optimize
import scipy.special
import scipy.stats
from numpy.typing import NDArray

from hvp_ray.errors import DataError
from hvp_ray.tracking.selection_log import PLAN_COLUMNS
from hvp_ray.views.geometry import crop_iou

LOG_FORMAT = 1

_FEATURE_OF_FIELD = {
    **{name: f"{name}_differs" if kind == pa.bool_() else name for name, kind in PLAN_COLUMNS.items()},
    "hue_turns": "hue",
    "blur_sigma_px": "blur_differs",
}
for _described_apart in ("top", "left", "height", "width", "jitter"):  # by overlap and area, and by the factors
    del _FEATURE_OF_FIELD[_described_apart]
_DIFFERS = tuple(name for name in _FEATURE_OF_FIELD.values() if name.endswith("_differs"))
_AMOUNTS = tuple(name for name in _FEATURE_OF_FIELD.values() if name not in _DIFFERS)

FEATURES = ("iou", "corner_distance", "area_ratio", *_AMOUNTS, *_DIFFERS)
"""The models' input for each pair; every operation of the plan adds one."""

MEASURES = ("iou", "corner_distance", "color_distance", "smaller_area", "larger_area", *_DIFFERS)
"""Values compared between chosen and other pairs; areas are fractions of the image, of the pair's two crops."""

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
_IMAGE_COLUMNS: dict[str, pa.DataType] = {
    "step": pa.int64(),
    "epoch": pa.int32(),
    "sample_id": pa.int64(),
    "image_height": pa.int32(),
    "image_width": pa.int32(),
    "chosen_pair": pa.int64(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRun:
    """The run that a log is of."""

    run_name: str
    recipe: str
    rule: str
    seed: int
    steps_per_epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionLog(LoggedRun):
    """The logged selections of a run, in step order."""

    pairs: NDArray[np.int64]
    """[P, 2], view indices."""
    num_images_left_out: int = 0
    """Logged images with another number of views, or other pairs, than most."""
    images: pa.Table
    """A row per image: step (optimizer steps done), epoch, sample_id, image_height and image_width in px, chosen_pair
    (row of `pairs`), scores (a list over the pairs, or null), and each field of `PLAN_COLUMNS` as a list over the views."""

    @property
    def num_images(self) -> int:
        """N."""
        return int(self.images.num_rows)

    @property
    def num_views(self) -> int:
        """V."""
        return int(self.images.schema.field("top").type.list_size)

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.pairs)

    def __getitem__(self, column: str) -> NDArray[Any]:
        """Return a column: [N]; fields of the plan [N, V]; scores [N, P], NaN if the rule needed none."""
        values = self.images[column].combine_chunks()
        if not pa.types.is_fixed_size_list(values.type):
            return np.asarray(values)
        present, size = np.asarray(values.is_valid()), values.type.list_size
        listed = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
        if present.all():
            return listed
        whole = np.full((len(values), size), np.nan, np.float32)
        whole[present] = listed
        return whole

    def take(self, rows: NDArray[np.int64]) -> "SelectionLog":
        """Return the log of some of the images."""
        return dataclasses.replace(self, images=self.images.take(pa.array(rows)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """A measure of the chosen pairs and of the other pairs of the same images."""

    chosen: float
    other: float
    standard_error: float | None
    """Of chosen minus other, over the images; None: one image."""


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
    """By the names of `MEASURES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IouHistogram:
    """Fractions of the pairs by IoU, in the last third of the logged steps; each column adds up to 1."""

    edges: tuple[float, ...]
    chosen_share: tuple[float, ...]
    other_share: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceFeature:
    """The effect of a feature in the choice model."""

    coefficient: float
    """Change of the log-odds for one standard deviation more of the feature; negative: less of it is chosen."""
    accuracy_lost: float
    """Held-out accuracy lost when the feature's values are shuffled among the pairs of each image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceModel:
    """How well the plan alone predicts the chosen pair: see `fit_choice_model`."""

    num_fitted: int
    num_held_out: int
    accuracy: float
    """Fraction of held-out images whose chosen pair the model ranks first."""
    min_iou_accuracy: float
    """Accuracy of the rule "the pair with the smallest IoU"."""
    chance: float
    log_likelihood_share: float
    """McFadden's: 1 - log-likelihood / log-likelihood of chance, held out; 0 is chance, 1 is certainty."""
    features: dict[str, ChoiceFeature]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFeature:
    """The effect of a feature in the score model, as fractions of a variance."""

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
    """Fraction of the variance of held-out scores (minus their image's mean) that the forest explains."""
    features: dict[str, ScoreFeature]


@dataclass(frozen=True, kw_only=True, slots=True)
class IouScoreCorrelation:
    """Correlation of IoU and score among the pairs of an image."""

    num_images: int
    pearson: float
    """Of both minus their image's mean, over all pairs."""
    spearman: float
    """Mean over the images of the rank correlation of their P pairs."""


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


def read_selection_log(run_dir: Path) -> SelectionLog:
    """Read the selection log of a run's folder.

    If a resumed run logged steps again, the first record counts. Steps with another number of views, or other pairs,
    than most are left out and counted.

    Raises:
        DataError: no log, or a damaged one.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder; expected the folder of a run, such as runs/<name>")
    layouts: dict[tuple[int, bytes], list[SelectionLog]] = {}
    seen = np.zeros(0, np.int64)
    for path in sorted((run_dir / "selection").glob("part-*.parquet")):
        part = _read_part(path)
        if part is not None:
            fresh = part.take(np.flatnonzero(~np.isin(part["step"], seen)))
            seen = np.union1d(seen, part["step"])
            layouts.setdefault((part.num_views, part.pairs.tobytes()), []).append(fresh)
    if not layouts:
        raise DataError(
            f"{run_dir} has no selection log (selection/part-*.parquet): the run chose nothing (selection.rule=first), "
            "or tracking.selection_images_per_epoch is 0, or the run has not reached its first logged step. Train with "
            "another rule and with tracking.selection_images_per_epoch above 0"
        )
    kept = max(layouts.values(), key=lambda logs: sum(log.num_images for log in logs))
    images = pa.concat_tables([log.images for log in kept]).sort_by("step")  # Arrow's sort is stable
    total = sum(log.num_images for logs in layouts.values() for log in logs)
    return dataclasses.replace(kept[0], images=images, num_images_left_out=total - images.num_rows)


def _read_part(path: Path) -> SelectionLog | None:
    """Return one file of the log; None: it has no rows."""
    try:
        table = pq.read_table(path)
        described = json.loads((table.schema.metadata or {})[b"hvp_ray"])
        if described["format"] != LOG_FORMAT:
            raise DataError(f"{path} has format {described['format']}; this version reads format {LOG_FORMAT}")
        if not table.num_rows:
            return None
        pairs = np.array(described["pairs"], np.int64).reshape(-1, 2)
        num_views = len(table["top"][0])
        columns = _IMAGE_COLUMNS | {"scores": pa.list_(pa.float32(), len(pairs))}
        columns |= {name: pa.list_(kind, num_views) for name, kind in PLAN_COLUMNS.items()}
        run = {field.name: described[field.name] for field in dataclasses.fields(LoggedRun)}
        log = SelectionLog(**run, pairs=pairs, images=table.select(list(columns)).cast(pa.schema(columns)))
        chosen = log["chosen_pair"]
        if chosen.min() < 0 or chosen.max() >= len(pairs) or pairs.max() >= num_views:
            raise ValueError(f"chosen_pair or pairs exceed {len(pairs)} pairs of {num_views} views")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a selection log ({error}); delete this file to skip it") from error
    return log


def describe_features(log: SelectionLog) -> dict[str, NDArray[np.float32]]:
    """Return the `FEATURES` and `MEASURES` of every pair, each [N, P].

    - iou: of the crops, px of the original image.
    - corner_distance: Euclidean distance of the top-left corners / diagonal of the image.
    - area_ratio, smaller_area, larger_area: of the pair's crops; the latter two as fractions of the image.
    - brightness, contrast, saturation, hue: absolute differences of the factors; a view without jitter has neutral
      ones (1, 1, 1 and 0 turns).
    - color_distance: Euclidean, over the same four.
    - ..._differs: 1 if one view of the pair has it and the other has not.

    Source: automl/hvp, branch analysis, analysis/metric_json_to_csv.py and plot_relative_dist.py.
    Differs: for missing jitter the authors put factors 0, far from any jittered view, and count a single difference as
        0 if either view has no jitter. Here missing jitter has neutral factors.
    """
    first, second = log.pairs[:, 0], log.pairs[:, 1]

    def difference(values: NDArray[Any]) -> NDArray[np.float32]:
        wide = values.astype(np.float32)
        return np.abs(wide[:, first] - wide[:, second])

    image_height, image_width = (log[name].astype(np.float64)[:, None] for name in ("image_height", "image_width"))
    top, left, height, width = (log[name] for name in ("top", "left", "height", "width"))
    areas = (height.astype(np.float64) * width / (image_height * image_width)).astype(np.float32)
    smaller, larger = np.minimum(areas[:, first], areas[:, second]), np.maximum(areas[:, first], areas[:, second])
    of_plan = {
        name: difference(log[field] != 0 if name in _DIFFERS else log[field])
        for field, name in _FEATURE_OF_FIELD.items()
    }
    colors = [of_plan[name] for name in ("brightness", "contrast", "saturation", "hue")]
    diagonal = np.hypot(image_height, image_width).astype(np.float32)
    return {
        "iou": crop_iou(top.T, left.T, height.T, width.T, log.pairs),
        "corner_distance": np.hypot(difference(top), difference(left)) / diagonal,
        "area_ratio": smaller / larger,
        "smaller_area": smaller,
        "larger_area": larger,
        "color_distance": np.sqrt(np.square(colors).sum(axis=0)),
        **of_plan,
    }


def analyse_selection(log: SelectionLog) -> SelectionAnalysis:
    """Compare the chosen pairs of a log with the others, and find what they were chosen for.

    Raises:
        DataError: there is one pair per image, so nothing was chosen.
    """
    if log.num_pairs < 2:
        raise DataError(
            f"the run {log.run_name} had {log.num_views} views and {log.num_pairs} pair per image, so nothing was "
            "chosen; train with selection.num_views of 3 or more"
        )
    step, epoch, contrasts = log["step"], log["epoch"], _contrast(log)
    epochs = np.unique(epoch)
    is_late = step >= step[-1] - (step[-1] - step[0]) / 3
    late = log.take(np.flatnonzero(is_late))
    sample = _subsample(late, min(_MAX_MODEL_IMAGES, _MAX_MODEL_PAIRS // log.num_pairs))
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
        choice_model=fit_choice_model(sample) if sample.num_images >= _MIN_MODEL_IMAGES else None,
        score_model=fit_score_model(scored) if scored.num_images >= _MIN_MODEL_IMAGES else None,
        iou_score_correlation=_correlate(scored) if scored.num_images else None,
    )


def _in_blocks(log: SelectionLog) -> Iterator[SelectionLog]:
    for start in range(0, log.num_images, _ROWS_AT_ONCE):
        yield dataclasses.replace(log, images=log.images.slice(start, _ROWS_AT_ONCE))


def _subsample(log: SelectionLog, limit: int) -> SelectionLog:
    if log.num_images <= limit:
        return log
    return log.take(np.sort(np.random.default_rng(0).permutation(log.num_images)[:limit]))


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
        features, chosen_pair = describe_features(block), block["chosen_pair"]
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
        ious = describe_features(block)["iou"]
        is_chosen = np.arange(log.num_pairs) == block["chosen_pair"][:, None]
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

    P(pair p is chosen) = softmax over the image's pairs of w . x_p, with standardised `FEATURES` x. w maximises the
    likelihood, with a ridge of 1e-4 that keeps it finite if the choice is certain. A feature that is equal for all pairs
    has weight 0.

    Source: McFadden 1974 (conditional logit).
    Differs: the HVP authors trained boosted trees on all six pairs' parameters at once (accuracy 0.41, chance 0.167).
    """
    features, (train, test) = _feature_array(log), _halves(log.num_images)
    spread = features[train].std(axis=(0, 1))
    features = (features - features[train].mean(axis=(0, 1))) / np.where(spread > 1e-9, spread, np.inf)
    weights = _maximise_choice_likelihood(features[train], log["chosen_pair"][train])
    held_out, chosen = features[test], log["chosen_pair"][test]

    def accuracy(values: NDArray[np.float64]) -> float:
        return float(((values @ weights).argmax(axis=1) == chosen).mean())

    whole, generator, found = accuracy(held_out), np.random.default_rng(1), {}
    for column, name in enumerate(FEATURES):
        shuffled = held_out.copy()
        shuffled[..., column] = generator.permuted(held_out[..., column], axis=1)
        found[name] = ChoiceFeature(coefficient=float(weights[column]), accuracy_lost=float(whole - accuracy(shuffled)))
    log_probabilities = scipy.special.log_softmax(held_out @ weights, axis=1)[np.arange(len(test)), chosen]
    return ChoiceModel(
        num_fitted=len(train),
        num_held_out=len(test),
        accuracy=whole,
        min_iou_accuracy=float((held_out[..., FEATURES.index("iou")].argmin(axis=1) == chosen).mean()),
        chance=1 / log.num_pairs,
        log_likelihood_share=float(1 + log_probabilities.mean() / np.log(log.num_pairs)),
        features=found,
    )


def _maximise_choice_likelihood(features_NPF: NDArray[np.float64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the weights [F] of the conditional logit."""
    rows = np.arange(len(chosen))
    of_chosen = features_NPF[rows, chosen]

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return minus the mean log-likelihood with its ridge, and the gradient."""
        log_probabilities = scipy.special.log_softmax(features_NPF @ weights, axis=1)
        expected = np.einsum("np,npf->nf", np.exp(log_probabilities), features_NPF)
        value = _RIDGE / 2 * weights @ weights - log_probabilities[rows, chosen].mean()
        return float(value), (expected - of_chosen).mean(axis=0) + _RIDGE * weights

    start, options = np.zeros(features_NPF.shape[2]), {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8}
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    weights: NDArray[np.float64] = found.x
    return weights


def fit_score_model(log: SelectionLog) -> ScoreModel | None:
    """Fit a random forest to the scores of half of the images, and weigh its features on the other half.

    The forest predicts a pair's score minus the mean of its image's pairs, so the hardness of the image plays no part.
    Each feature has two importances, both fractions of a variance:

    - main_effect: variance over the feature's values of the forest's prediction averaged over all other features,
      divided by the variance of the forest's predictions. This is fANOVA's importance of a single parameter, over the
      distribution of the logged pairs.
    - permutation: (squared error with the feature shuffled among all held-out pairs - squared error) / (2 x variance
      of the scores). It also counts what the feature does together with others.

    Returns:
        None if the scores are all equal.

    Source: Hutter, Hoos, Leyton-Brown, ICML 2014 (fANOVA).
    Differs: the HVP authors' forest predicts the similarity of the selected pair alone (`AUTHORS_FANOVA`), not of all
        pairs, and its importances are over the box of the parameters.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    log = _subsample(log, max(_MIN_MODEL_IMAGES, _MAX_FOREST_PAIRS // log.num_pairs))
    features, (train, test) = _feature_array(log), _halves(log.num_images)
    scores = log["scores"].astype(np.float64)
    scores -= scores.mean(axis=1, keepdims=True)
    if scores[train].std() < 1e-9 or scores[test].std() < 1e-9:
        return None
    fitted, held_out = (features[half].reshape(-1, len(FEATURES)) for half in (train, test))
    target = scores[test].ravel()
    forest = RandomForestRegressor(n_estimators=50, min_samples_leaf=20, max_features=0.5, random_state=0, n_jobs=1)
    forest.fit(fitted, scores[train].ravel())
    gained = permutation_importance(
        forest, held_out, target, scoring="neg_mean_squared_error", n_repeats=1, random_state=2
    ).importances_mean
    variance = float(target.var())
    spread = max(float(forest.predict(held_out).var()), 1e-12)
    return ScoreModel(
        num_fitted=len(train),
        num_held_out=len(test),
        r2=float(forest.score(held_out, target)),
        features={
            name: ScoreFeature(
                main_effect=_marginal_variance(forest, held_out, column) / spread,
                permutation=float(gained[column]) / (2 * variance),
            )
            for column, name in enumerate(FEATURES)
        },
    )


def _marginal_variance(forest: Any, features: NDArray[np.float64], column: int) -> float:
    """Return the variance of the forest's marginal over one feature, over the distribution of its values."""
    from sklearn.inspection import partial_dependence

    background = features[np.random.default_rng(2).permutation(len(features))[:256]]
    levels = np.unique(np.quantile(features[:, column], np.linspace(0, 1, 33)))
    marginal = partial_dependence(forest, background, [column], custom_values={column: levels}, method="brute")
    return float(np.interp(features[:, column], levels, marginal["average"][0]).var())


def _correlate(log: SelectionLog) -> IouScoreCorrelation | None:
    """Return the correlation of IoU and score; None: either is equal for all pairs of every image."""

    def correlations(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
        """Return Pearson's correlation of each row; rows without spread are left out."""
        varies = (np.ptp(first, axis=1) > 1e-6) & (np.ptp(second, axis=1) > 1e-6)
        found: NDArray[np.float64] = scipy.stats.pearsonr(first[varies], second[varies], axis=1).statistic
        return found

    ious, scores = describe_features(log)["iou"].astype(np.float64), log["scores"].astype(np.float64)
    centred = ((values - values.mean(axis=1, keepdims=True)).reshape(1, -1) for values in (ious, scores))
    pearson = correlations(*centred)
    spearman = correlations(*(scipy.stats.rankdata(values, axis=1) for values in (ious, scores)))
    if not len(pearson) or not len(spearman):
        return None
    return IouScoreCorrelation(num_images=log.num_images, pearson=float(pearson[0]), spearman=float(spearman.mean()))
