"""The predictor of rule predicted, replayed on logged scores: learn from probes of earlier steps, choose without scores."""

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.replay.scores import LoggedScores
from hvp_ray.selection.proposals import HardnessPredictor, pair_features, probe_statistics


def chosen_by_predictor(
    logged: LoggedScores, *, num_probe_views: int, probe_images: int, probe_every: int
) -> NDArray[np.float64]:
    """Return the score of the pair that is predicted to be the hardest, with the first k local views, [N].

    Args:
        logged: the candidates.
        num_probe_views: the model learns from the pairs of this number of first views.
        probe_images: images of a probe: the first of the step.
        probe_every: steps between probes.
    """
    pairs = logged.candidates.pairs
    probed_P = np.flatnonzero((pairs < num_probe_views).all(axis=1))
    predictor, chosen = HardnessPredictor(delay=1), []
    for count, images in enumerate(logged.steps()):
        step = logged.take(images)
        features_FPB = pair_features(step.plan, *step.image_sizes, pairs)
        coefficients = predictor.coefficients_of(count)
        if coefficients is None:  # as views 0 and 1 of a vanilla step
            chosen.append(np.zeros(len(step.step_N), np.int64))
        else:
            chosen.append(np.einsum("f,fpb->bp", coefficients, features_FPB).argmax(axis=1))
        statistics = None
        if count % probe_every == 0:
            features = torch.from_numpy(features_FPB[:, probed_P, :probe_images])
            statistics = probe_statistics(features, step.scores.pairs_BP[:probe_images, probed_P]).numpy()
        predictor.end_step(statistics)
    return logged.of_pairs(np.concatenate(chosen))
