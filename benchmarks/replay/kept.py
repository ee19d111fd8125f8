"""Hardness kept: what a choice is worth between a random candidate and the hardest.

Legend: N logged images, S logged steps, R resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvp_ray.errors import DataError

_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Hardness kept, with its 95 % interval over the logged steps."""

    kept: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptScale:
    """The scale of hardness of some images: 0 is the mean of an image's candidates, 1 the hardest."""

    step_N: NDArray[np.int64]  # noqa: N815 (shape letters)
    """Ascending."""
    mean_N: NDArray[np.float64]  # noqa: N815
    hardest_N: NDArray[np.float64]  # noqa: N815

    def of(self, chosen_N: NDArray[np.float64], window: slice = slice(None)) -> Kept:
        """Return (chosen - mean) / (hardest - mean), both summed over the images of a window of the logged steps.

        The interval is the percentile bootstrap over the steps, whose images share their weights and their batch.
        """
        starts = np.flatnonzero(np.diff(self.step_N, prepend=self.step_N[0] - 1))
        gained_S = np.add.reduceat(chosen_N - self.mean_N, starts)[window]
        most_S = np.add.reduceat(self.hardest_N - self.mean_N, starts)[window]
        count = len(most_S)
        times_RS = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
        low, high = np.quantile((times_RS @ gained_S) / (times_RS @ most_S), [0.025, 0.975])
        return Kept(kept=float(gained_S.sum() / most_S.sum()), low=float(low), high=float(high))

    def thirds(self) -> dict[str, slice]:
        """Return the first, middle and last third of the logged steps.

        Raises:
            DataError: there are fewer than three.
        """
        count = len(np.unique(self.step_N))
        if count < 3:
            raise DataError(
                f"{count} logged steps, expected 3 or more: train longer, or raise tracking.selection_images_per_epoch"
            )
        edges = [0, count // 3, 2 * count // 3, count]
        return {name: slice(edges[i], edges[i + 1]) for i, name in enumerate(("first", "middle", "last"))}
