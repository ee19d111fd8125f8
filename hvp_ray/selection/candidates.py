"""The candidates: all unordered pairs of views, in lexicographic order."""

import numpy as np
from numpy.typing import NDArray

from hvp_ray.errors import ShapeError


def num_pairs(num_views: int) -> int:
    """Return P = V(V-1)/2."""
    return num_views * (num_views - 1) // 2


def pair_table(num_views: int) -> NDArray[np.int64]:
    """Return the view indices of every pair, [P, 2]: (0,1), (0,2), ..., (1,2), ...

    Raises:
        ShapeError: fewer than two views.
    """
    if num_views < 2:
        raise ShapeError(f"{num_views=}: a pair needs two views")
    return np.argwhere(np.triu(np.ones((num_views, num_views), dtype=bool), k=1)).astype(np.int64)
