"""Data sets that Hugging Face's library saved to disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hvp_ray.errors import DataError, LabelError
from tests.unit.data.made import PARQUET_TYPE, draw_images, open_any, pack_here, write_saved

IMAGES = draw_images(20, np.random.default_rng(0))
LABELS = [index % 3 for index in range(20)]


def _table(labels: Any = LABELS, **columns: Any) -> pa.Table:
    rows = [{"bytes": image, "path": None} for image in IMAGES]
    return pa.table({"img": pa.array(rows, PARQUET_TYPE), "label": labels} | columns)


@pytest.mark.parametrize("kind", ["ClassLabel", "integers", "strings"])
def test_the_library_writes_what_is_read(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    names = ["zebra", "ant", "cat"]
    features = {"img": datasets.Image(), "label": datasets.Value("string" if kind == "strings" else "int64")}
    if kind == "ClassLabel":
        features["label"] = datasets.ClassLabel(names=names)
    values = [names[label] for label in LABELS] if kind == "strings" else LABELS
    rows = {"img": [{"bytes": image, "path": None} for image in IMAGES], "label": values}
    saved = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    source = open_any(tmp_path / "saved")
    assert source.kind == "a Hugging Face data set on disk"
    assert source.read([19, 0, 7]) == [IMAGES[19], IMAGES[0], IMAGES[7]]
    found = [source.load_class_names()[label] for label in source.load_labels().tolist()] if kind != "integers" else []
    assert found == ([names[label] for label in LABELS] if kind != "integers" else [])
    assert source.load_labels().tolist() == ([(2, 0, 1)[label] for label in LABELS] if kind == "strings" else LABELS)
    assert (
        source.load_class_names()
        == {"ClassLabel": tuple(names), "integers": (), "strings": ("ant", "cat", "zebra")}[kind]
    )
    saved.select([5, 3]).save_to_disk(str(tmp_path / "some"))
    assert open_any(tmp_path / "some").read([0, 1]) == [IMAGES[5], IMAGES[3]]
    datasets.DatasetDict(train=saved, validation=saved).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(
        DataError, match=r"several splits \(train, validation\); name one: --data.source .*/splits/train"
    ):
        open_any(tmp_path / "splits")
    assert open_any(tmp_path / "splits" / "validation").fingerprint() == source.fingerprint()


def test_rows_of_all_files_and_batches_are_addressed(tmp_path: Path) -> None:
    source = open_any(write_saved(tmp_path / "saved", _table(), num_files=2))
    assert source.read(range(20)) == IMAGES
    assert source.describe(13) == f"{tmp_path}/saved/data-00001-of-00002.arrow row 3"
    assert source.num_bytes == sum(map(len, IMAGES))
    assert source.shares_files_with(open_any(tmp_path / "saved"))
    assert source.fingerprint() != open_any(write_saved(tmp_path / "o", _table().slice(1))).fingerprint()


def test_null_and_large_images_are_no_bytes(tmp_path: Path) -> None:
    rows = [
        None,
        {"bytes": None, "path": "x"},
        {"bytes": b"x" * (2**20 + 1), "path": None},
        {"bytes": b"y", "path": None},
    ]
    table = pa.table({"image": pa.array(rows, PARQUET_TYPE), "label": ["b", None, "a", "b"]})
    source = open_any(write_saved(tmp_path, table), max_image_mib=1)
    assert source.read([0, 1, 2, 3]) == [b"", b"", b"", b"y"]
    assert source.load_labels().tolist() == [1, -1, 0, 1]


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    source = open_any(write_saved(tmp_path / "a", _table(pa.nulls(20))))
    with pytest.raises(LabelError, match="column 'label' is empty. Name the column of labels by --data.label_column"):
        source.load_labels()
    two = write_saved(tmp_path / "b", _table(depth=pa.array([{"bytes": b"d", "path": ""}] * 20, PARQUET_TYPE)))
    with pytest.raises(DataError, match=r"\['img', 'depth'\]. Choose one by --data.image_column"):
        open_any(two)
    assert open_any(two, image_column="depth").read([3]) == [b"d"]


def test_saved_data_set_is_packed(tmp_path: Path) -> None:
    pack_here(write_saved(tmp_path / "saved", _table()), tmp_path / "shards")
    packed = open_any(tmp_path / "shards")
    assert (packed.read(range(20)), packed.load_labels().tolist()) == (IMAGES, LABELS)


def _cut(folder: Path, num_bytes: int) -> None:
    path = folder / "data-00001-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:-num_bytes])


def _with_wrong_offsets(folder: Path) -> None:
    path = folder / "data-00000-of-00002.arrow"
    content, offsets = path.read_bytes(), np.cumsum([0, *map(len, IMAGES[:7])]).astype("<i4").tobytes()
    assert offsets in content
    wrong = np.cumsum([0, *map(len, IMAGES[:7])]).astype("<i4")
    wrong[3] = 2**30
    path.write_bytes(content.replace(offsets, wrong.tobytes()))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (
        lambda folder: (folder / "data-00001-of-00002.arrow").unlink(),
        "00001-of-00002.arrow is missing, but",
    ),
    "cut": (lambda folder: _cut(folder, 3_000), "00001-of-00002.arrow is damaged or not complete"),
    "cut at its end": (lambda folder: _cut(folder, 8), "it does not end as Arrow streams do"),
    "no Arrow": (
        lambda folder: (folder / "data-00000-of-00002.arrow").write_bytes(b"x" * 99),
        "damaged or not complete",
    ),
    "empty": (lambda folder: (folder / "data-00000-of-00002.arrow").write_bytes(b""), "damaged or not complete"),
    "offsets outside": (_with_wrong_offsets, "column 'img.bytes' is damaged"),
    "state": (lambda folder: (folder / "state.json").write_text("{"), "state.json is damaged"),
    "names": (
        lambda folder: (folder / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}'),
        "of this folder",
    ),
    "no names": (lambda folder: (folder / "state.json").write_text("[]"), "names no Arrow files"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence_that_names_the_file(tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGE[name]
    folder = write_saved(tmp_path / "saved", _table(), num_files=2)
    damage(folder)
    with pytest.raises(DataError, match=reason) as raised:
        open_any(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_saved_data_set_at_a_uri_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"read from this machine only: download it, or save it as Parquet"):
        open_any(write_saved(tmp_path / "saved", _table()).as_uri())
