"""The embedded data set: scikit-learn's scanned digits. The first command needs no network.

1,797 grey images of 8 x 8 px, enlarged to 32 x 32 and encoded as PNG. It serves as a smoke test only: k-NN on raw pixels
reaches 0.98 with all labels.
"""

import hashlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvp_ray.data.source import DIGITS, Place, Source

DIGITS_SIZE_PX = 32


def open_digits(place: Place) -> Source | None:
    """Return the digits if they are named."""
    return DigitsSource() if place.location == DIGITS else None


def _load_rows() -> NDArray[np.int64]:
    """Return [1797, 65]: 64 counts of dark cells, 0 to 16, and the digit."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.submodule_search_locations  # hvp_ray requires it
    path = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if path.exists():
        return np.loadtxt(path, delimiter=",", dtype=np.int64)
    from sklearn.datasets import load_digits  # takes seconds

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.int64)


class DigitsSource(Source):
    """Serve the digits as PNG files."""

    kind = "scikit-learn's digits"
    num_samples = 1_797
    num_bytes = 673 * 1_797
    has_labels = True

    def __init__(self) -> None:
        rows = _load_rows()
        self._images = np.rint(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._digits = rows[:, -1]
        self._encoded: dict[int, bytes] = {}

    def read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the digits, and their names "0" to "9"."""
        return self._digits, tuple("0123456789")

    def fingerprint(self) -> str:
        """Return a digest of the pixels."""
        return hashlib.sha256(self._images.tobytes()).hexdigest()

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return PNG files."""
        return [self._encode(sample_id) for sample_id in sample_ids]

    def describe(self, sample_id: int) -> str:
        """Return the digit's index."""
        return f"digits[{sample_id}]"

    def _encode(self, sample_id: int) -> bytes:
        if sample_id not in self._encoded:
            small = Image.fromarray(self._images[sample_id])
            large = small.resize((DIGITS_SIZE_PX, DIGITS_SIZE_PX), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            large.save(buffer, format="PNG")
            self._encoded[sample_id] = buffer.getvalue()
        return self._encoded[sample_id]
