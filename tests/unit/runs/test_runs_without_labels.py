"""Labels never stop pretraining: what is wrong with them is said before the first step, and training goes on."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvp_ray.config import RunConfig
from hvp_ray.data.digits import DigitsSource
from hvp_ray.errors import DataError
from hvp_ray.launch.driver import Watchers, launch
from hvp_ray.launch.local import pretrain_in_process
from tests.helpers import tiny_config
from tests.unit.data.made import PARQUET_TYPE


def _config(tmp_path: Path, labels: pa.Array, **data: object) -> RunConfig:
    """Digits in a Parquet file with this column `label`."""
    images = DigitsSource().read(range(len(labels)))
    rows = pa.array([{"bytes": image, "path": ""} for image in images], PARQUET_TYPE)
    pq.write_table(pa.table({"image": rows, "label": labels}), tmp_path / "digits.parquet")
    return tiny_config(
        str(tmp_path / "runs"),
        run={"name": "run"},
        data={"source": str(tmp_path / "digits.parquet"), "num_images": None} | data,
        training={"num_steps": 2},
        tracking={"knn_every_epochs": 1},
    )


@pytest.mark.parametrize("kind", ["strings", "categories", "floats", "booleans"])
def test_run_is_evaluated_with_labels_of_any_type(tmp_path: Path, kind: str) -> None:
    digits = DigitsSource().load_labels()[:80]
    labels = {
        "strings": pa.array([f"digit {label}" for label in digits]),
        "categories": pa.array([f"digit {label}" for label in digits]).dictionary_encode(),
        "floats": pa.array(digits.astype(float)),
        "booleans": pa.array(digits == 1),
    }
    summary = pretrain_in_process(_config(tmp_path, labels[kind]))
    assert summary is not None
    assert summary["knn_top1_pixels"] > 0.5


def test_run_with_unusable_labels_says_so_once_at_the_start_and_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = pa.array([[1, 2]] * 80)
    with caplog.at_level(logging.WARNING):
        summary = pretrain_in_process(_config(tmp_path, labels))
    assert summary is not None and summary["num_steps"] == 2 and summary["num_training_images"] == 80
    assert summary["knn_top1"] is None
    (said,) = [record.message for record in caplog.records if "k-NN" in record.message]
    assert said.startswith("no k-NN evaluation of this run: ") and "has type list<" in said


class _StoppedError(Exception):
    pass


def _stop(message: str) -> None:
    raise _StoppedError(message)


_WATCHERS = Watchers(announce=lambda _: None, show_progress=lambda _: None, show_message=_stop)


def test_images_that_stay_held_out_are_said(tmp_path: Path) -> None:
    config = _config(tmp_path, pa.array([0.5] * 80))
    with pytest.raises(_StoppedError, match=r"holds fractions.* 16 images stay held out"):
        launch(config, _WATCHERS)


def test_misspelt_column_is_said_before_anything_starts(tmp_path: Path) -> None:
    config = _config(tmp_path, pa.array([1] * 80), label_column="classes")
    with pytest.raises(
        _StoppedError, match=r"has no column 'classes'; it has \['image', 'label'\].*Training starts without"
    ):
        launch(config, _WATCHERS)


def test_classes_that_cannot_be_matched_stop_a_run_before_anything_starts(tmp_path: Path) -> None:
    config = _config(tmp_path, pa.array([1] * 80), test_source="digits")
    for start in (pretrain_in_process, lambda config: launch(config, _WATCHERS)):
        with pytest.raises(DataError, match="cannot be matched: training has the numbers 1 without names"):
            start(config)
    assert not (tmp_path / "runs").exists()
    summary = pretrain_in_process(tiny_config(str(tmp_path / "runs"), tracking={"knn_images": 0}))
    assert summary is not None and summary["knn_top1"] is None
