"""Models of a selection log: which pair is chosen, and what makes a pair hard.

Legend: N logged images, P pairs, F features of a pair.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from numpy.typing import NDArray

from hvp_ray.tracking.logged_pairs import FEATURES, SelectionLog, pair_features

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

MIN_IMAGES = 100
"""Fewer images fit no model."""

_MAX_FOREST_PAIRS = 36_000
_RIDGE = 1e-4


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
    """Correlation over all pairs, of both minus their image's mean."""
    spearman: float
    """Mean over the images of the rank correlation of their P pairs."""


def _feature_array(log: SelectionLog) -> NDArray[np.float64]:
    """Return `FEATURES`, [N, P, F]."""
    features = pair_features(log)
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

    log = log.sample(max(MIN_IMAGES, _MAX_FOREST_PAIRS // log.num_pairs))
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


def correlate_iou_and_score(log: SelectionLog) -> IouScoreCorrelation | None:
    """Return the correlation of IoU and score; None: either is equal for all pairs of every image."""

    def correlations(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
        """Return Pearson's correlation of each row; rows without spread are left out."""
        varies = (np.ptp(first, axis=1) > 1e-6) & (np.ptp(second, axis=1) > 1e-6)
        found: NDArray[np.float64] = scipy.stats.pearsonr(first[varies], second[varies], axis=1).statistic
        return found

    ious, scores = pair_features(log)["iou"].astype(np.float64), log["scores"].astype(np.float64)
    centred = ((values - values.mean(axis=1, keepdims=True)).reshape(1, -1) for values in (ious, scores))
    pearson = correlations(*centred)
    spearman = correlations(*(scipy.stats.rankdata(values, axis=1) for values in (ious, scores)))
    if not len(pearson) or not len(spearman):
        return None
    return IouScoreCorrelation(num_images=log.num_images, pearson=float(pearson[0]), spearman=float(spearman.mean()))
