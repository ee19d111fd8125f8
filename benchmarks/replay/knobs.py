"""Every knob of hardness, replayed on the logged scores of one run: its price, and the scores of what it trains on.

Legend: N logged images, P pairs.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.replay.predicted import chosen_by_predictor
from benchmarks.replay.prices import Prices
from benchmarks.replay.scores import LoggedScores
from hvp_ray.config import RunConfig, SelectionConfig, Weighting
from hvp_ray.selection import easiest_images, pair_weights_of

_LIMITS = (8, 16, 32, 64, 128)
_PROBE_EVERY = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting of one knob."""

    knob: str
    value: str
    """Empty: the knob has no values."""
    price: float
    """Random steps."""
    chosen_N: NDArray[np.float64]  # noqa: N815 (shape letter)
    """Score of what each image is trained on; with several pairs, their weighted mean."""


def replay(logged: LoggedScores, config: RunConfig, num_views: int) -> Iterator[Setting]:
    """Yield all settings. All but the number of views and of plans have the candidates of the first `num_views` views."""
    prices, among = Prices(config), logged.of_first_views(num_views)
    scoring = prices.hard(num_views) - 1.0
    random_N, hardest_N = among.mean(), among.chosen_by("hardest")

    yield Setting(knob="random", value="", price=1.0, chosen_N=among.chosen_by("random"))
    yield Setting(knob="min_iou", value="", price=1.0, chosen_N=among.chosen_by("min_iou"))
    has_locals = logged.candidates.num_local_views > 0
    for views in range(2 if has_locals else 3, logged.candidates.num_views + 1):
        chosen_N = logged.of_first_views(views).chosen_by("hardest")
        yield Setting(knob="views", value=str(views), price=prices.hard(views), chosen_N=chosen_N)
    for every in (2, 3, 4, 6):
        step = np.unique(among.step_N, return_inverse=True)[1]
        chosen_N = np.where(step % every == 0, hardest_N, random_N)
        yield Setting(knob="every", value=f"{every}", price=1.0 + scoring / every, chosen_N=chosen_N)
    place_N, images_N = _place_in_step(among)
    for share in (0.75, 0.5, 0.25, 0.1):
        chosen_N = np.where(place_N < share * images_N, hardest_N, random_N)
        yield Setting(knob="share", value=f"{share:g}", price=1.0 + share * scoring, chosen_N=chosen_N)
    yield from rescues(among, prices, hardest_N)
    for limit in _LIMITS:
        if limit < among.candidates.count:
            chosen_N = among.chosen_by("hardest", limit=limit)
            yield Setting(knob="limit", value=f"{limit}", price=1.0 + scoring, chosen_N=chosen_N)
    above_N = hardest_N
    for quantile in (0.9, 0.8, 0.65, 0.5):
        chosen_N = among.chosen_by("hardest", quantile=quantile)
        if not np.array_equal(chosen_N, above_N):  # few candidates have few places
            yield Setting(knob="quantile", value=f"{quantile:g}", price=1.0 + scoring, chosen_N=chosen_N)
        above_N = chosen_N
    if not has_locals:
        yield from _weightings(among, prices.all_pairs(num_views))
    for plans in range(3, logged.candidates.num_views + 1):
        yield _predicted(logged.of_first_views(plans), prices, num_views, "plans", plans, probe_images=16)
    for probe_images in (4, 64):
        yield _predicted(among, prices, num_views, "probes", probe_images, probe_images=probe_images)


def _predicted(
    logged: LoggedScores, prices: Prices, num_views: int, knob: str, value: int, *, probe_images: int
) -> Setting:
    """Choose among all logged views, and learn from the first `num_views` of some images."""
    chosen_N = chosen_by_predictor(
        logged, num_probe_views=num_views, probe_images=probe_images, probe_every=_PROBE_EVERY
    )
    price = prices.probed(num_views, probe_images=probe_images, probe_every=_PROBE_EVERY)
    return Setting(knob=knob, value=str(value), price=price, chosen_N=chosen_N)


def _place_in_step(logged: LoggedScores) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each image's place in its logged step, and how many images that has, [N]."""
    counts = [images.stop - images.start for images in logged.steps()]
    return np.concatenate([np.arange(count) for count in counts]), np.repeat(counts, counts)


def rescues(among: LoggedScores, prices: Prices, hardest_N: NDArray[np.float64]) -> Iterator[Setting]:
    """Score two views of all images; of the easiest in a step, score the others too and take the hardest."""
    of_two_N = among.of_first_views(2).chosen_by("hardest")
    for share in (0.1, 0.25, 0.5, 0.75):
        chosen_N = of_two_N.copy()
        for images in among.steps():
            count = dataclasses.replace(among.candidates, rescue_share=share).num_rescued(images.stop - images.start)
            easiest = images.start + easiest_images(torch.from_numpy(of_two_N[images]), count).numpy()
            chosen_N[easiest] = hardest_N[easiest]
        two, all_views = prices.hard(2), prices.hard(among.candidates.num_views)
        price = two + share * (all_views - two)
        yield Setting(knob="rescue", value=f"{share:g}", price=price, chosen_N=chosen_N)


def _weightings(among: LoggedScores, price: float) -> Iterator[Setting]:
    """Weight all pairs; the hardness is that of the weighted mean."""
    settings: dict[Weighting, list[dict[str, Any]]] = {
        "softmax": [{"weight_temperature": temperature} for temperature in (0.25, 0.5, 1.0, 2.0)],
        "top_k": [{"weight_top_k": k} for k in (1, 2, 3)],
        "matching": [{}] if among.candidates.num_views % 2 == 0 else [],
        "partner": [{}],
    }
    scores_NP = among.scores.pairs_BP
    for weighting, values in settings.items():
        for fields in values:
            selection = SelectionConfig(rule="all_pairs", weighting=weighting, **fields)
            weigh = pair_weights_of(selection, among.candidates, device=torch.device("cpu"))
            assert weigh is not None
            chosen_N = (weigh(scores_NP) * scores_NP).sum(dim=1).double().numpy()
            value = "".join(f"{value:g}" for value in fields.values())
            yield Setting(knob=weighting, value=value, price=price, chosen_N=chosen_N)
