"""The k-NN of a run matches training and test images by the names of their classes."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hvp_ray.data.dataset import open_dataset
from hvp_ray.data.digits import DigitsSource
from hvp_ray.evaluation.knn import knn_accuracy
from hvp_ray.evaluation.report import load_knn_data
from tests.helpers import tiny_config
from tests.unit.data.made import PARQUET_TYPE

DIGITS = DigitsSource()
TRAINING_IDS, TEST_IDS = range(0, 600), range(600, 900)


def _write(root: Path, kind: str, ids: range, *, without: int | None = None, renamed: int | None = None) -> str:
    """Write these digits as a source of `kind`, without one class, or with one class under another name."""
    labels = DIGITS.load_labels()
    names = [f"digit-{'other' if label == renamed else label}" for label in range(10)]
    kept = [sample_id for sample_id in ids if labels[sample_id] != without]
    if kind == "folder":
        for sample_id in kept:
            path = root / names[labels[sample_id]] / f"{sample_id:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(DIGITS.read([sample_id])[0])
        return str(root)
    rows = pa.array([{"bytes": DIGITS.read([sample_id])[0], "path": ""} for sample_id in kept], PARQUET_TYPE)
    found = [names[labels[sample_id]] for sample_id in kept]
    root.mkdir(parents=True, exist_ok=True)
    if kind == "strings":
        table = pa.table({"image": rows, "label": found})
    else:  # datasets.ClassLabel
        order = sorted(set(found), reverse=True)
        table = pa.table({"image": rows, "label": [order.index(name) for name in found]})
        features = {"info": {"features": {"label": {"names": order, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, root / "all.parquet")
    return str(root)


def _pixel_accuracy(tmp_path: Path, source: str, test_source: str) -> tuple[float, int]:
    config = tiny_config(
        str(tmp_path),
        data={"source": source, "test_source": test_source, "num_images": None},
        tracking={"knn_images": 10_000},
    )
    knn_data = load_knn_data(config, open_dataset(config.data))
    assert knn_data is not None
    bank, queries = (torch.from_numpy(pixels).flatten(1).float() for pixels in (knn_data.bank, knn_data.queries))
    labels, truth = torch.from_numpy(knn_data.bank_labels), torch.from_numpy(knn_data.query_labels)
    return knn_accuracy(bank, labels, queries, truth, neighbours=20), len(queries)


@pytest.mark.parametrize("kind", ["folder", "strings", "class-label"])
def test_classes_that_one_side_lacks_do_not_shift_the_others(tmp_path: Path, kind: str) -> None:
    """By position, a class without test images made every later class another one: 0.95 became 0.002."""
    whole = _write(tmp_path / "training", "folder", TRAINING_IDS)
    accuracy, num_queries = _pixel_accuracy(tmp_path, whole, _write(tmp_path / "test", kind, TEST_IDS))
    assert accuracy > 0.85 and num_queries == len(TEST_IDS)
    # Without zeros in test, 0 is still an answer; the other digits are as hard as before.
    fewer = _write(tmp_path / "fewer", kind, TEST_IDS, without=0)
    assert _pixel_accuracy(tmp_path, whole, fewer)[0] == pytest.approx(accuracy, abs=0.03)
    # Zeros under a name that training does not have cannot be classified, and are left out.
    more = _write(tmp_path / "more", kind, TEST_IDS, renamed=0)
    assert _pixel_accuracy(tmp_path, whole, more) == _pixel_accuracy(tmp_path, whole, fewer)
