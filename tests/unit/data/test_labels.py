"""Labels are valid in their own source only: two sources are matched by their class names, or not at all."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvp_ray.config import DataConfig
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.data.labels import match_labels
from hvp_ray.data.source import UNLABELLED
from hvp_ray.errors import DataError, LabelError
from tests.helpers import encode
from tests.unit.data.made import PARQUET_TYPE, open_any, pack_here

KINDS = ["folder", "strings", "categories", "class label"]


def _image(index: int) -> bytes:
    return encode(np.full((4, 5, 3), index, np.uint8))


def _write_parquet(
    path: Path, labels: pa.Array | list[object] | None, *, names: list[str] | None = None, column: str = "label"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 4 if labels is None else len(labels)
    table = pa.table({"image": pa.array([{"bytes": _image(i), "path": ""} for i in range(count)], PARQUET_TYPE)})
    if labels is not None:
        table = table.append_column(column, pa.array(labels) if isinstance(labels, list) else labels)
    if names is not None:
        features = {"info": {"features": {column: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=3)
    return path


def _write(root: Path, kind: str, classes: Sequence[str]) -> Path:
    """Write one image for each of these classes, which are sorted, as a source of `kind`."""
    match kind:
        case "folder":
            for index, name in enumerate(classes):
                (root / name).mkdir(parents=True, exist_ok=True)
                (root / name / f"{index}.png").write_bytes(_image(index))
            return root
        case "strings":
            return _write_parquet(root / "all.parquet", list(classes))
        case "categories":
            return _write_parquet(root / "all.parquet", pa.array(list(classes)).dictionary_encode())
        case _:
            names = sorted({*classes, "never"}, reverse=True)
            return _write_parquet(root / "all.parquet", [names.index(name) for name in classes], names=names)


def _open_both(training: Path, test: Path) -> Dataset:
    return open_dataset(DataConfig(source=str(training), test_source=str(test)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("test_kind", KINDS)
def test_classes_of_any_two_sources_are_matched_by_name(tmp_path: Path, kind: str, test_kind: str) -> None:
    dataset = _open_both(
        _write(tmp_path / "training", kind, ["ant", "bee", "cat", "cat", "dog"]),
        _write(tmp_path / "test", test_kind, ["bee", "cat", "cow", "dog", "dog"]),
    )
    labels = match_labels(dataset)
    names = dataset.source.load_class_names()
    assert [names[label] for label in labels.of_training] == ["ant", "bee", "cat", "cat", "dog"]
    assert [names[label] for label in labels.of_test[[0, 1, 3, 4]]] == ["bee", "cat", "dog", "dog"]
    assert labels.of_test[2] == UNLABELLED
    assert labels.test_ids.tolist() == [0, 1, 3, 4]
    (remark,) = labels.remarks
    assert remark.startswith("1 of 5 labelled test images are of 1 class(es)") and remark.endswith("'cow'")


def test_classes_that_are_listed_but_have_no_training_image_are_left_out(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog"]
    training = _write_parquet(tmp_path / "a.parquet", [0, 0, 2], names=names)
    labels = match_labels(_open_both(training, _write_parquet(tmp_path / "b.parquet", [0, 1, 3, 2], names=names)))
    assert labels.test_ids.tolist() == [0, 3] and labels.of_test.tolist() == [0, UNLABELLED, UNLABELLED, 2]
    (remark,) = labels.remarks
    assert remark.startswith("2 of 4 labelled test images are of 2 class(es)") and remark.endswith("'bee', 'dog'")
    only_new = _write_parquet(tmp_path / "c.parquet", [1, 3], names=names)
    with pytest.raises(LabelError, match="none of the 2 test images has a label of a class of the training images"):
        match_labels(_open_both(training, only_new))


def test_a_class_whose_only_image_is_held_out_is_left_out(tmp_path: Path) -> None:
    classes = [*(["ant"] * 6), "bee", "cat", "dog", "eel"]
    dataset = open_dataset(DataConfig(source=str(_write(tmp_path / "all", "strings", classes)), test_fraction=0.5))
    labels = match_labels(dataset)
    names = dataset.source.load_class_names()
    assert {names[label] for label in labels.of_test[labels.test_ids]} == {"ant"}
    rare = [index for index in dataset.test_ids.tolist() if index >= 6]
    assert rare and labels.remarks[0].startswith(f"{len(rare)} of {len(dataset.test_ids)} labelled test images")
    assert np.array_equal(labels.of_training, dataset.source.load_labels())


def test_images_without_label_are_counted(tmp_path: Path) -> None:
    table = [f"{index}.png,{label}" for index, label in enumerate(("US", "NA", "DE", "", "null", "US", "DE", "US"))]
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(_image(index))
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["path,label", *table]) + "\n")
    dataset = open_dataset(DataConfig(source=str(path), test_fraction=0.0, test_source=str(path)))
    dataset = dataclasses.replace(dataset, test_source=dataset.source, test_ids=np.array([0, 2]))
    (remark,) = match_labels(dataset).remarks
    assert remark == "3 of 8 training images have no label, and are left out of evaluations"


def test_a_list_that_names_a_file_twice_is_not_split(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(_image(index))
    path = tmp_path / "list.csv"
    path.write_text("path,label\n0.png,a\n1.png,b\n0.png,a\n2.png,a\n0.png,b\n3.png,b\n")
    with pytest.raises(DataError, match=r"^2 images of data.source name a file that is named before.*knn_images 0$"):
        match_labels(open_dataset(DataConfig(source=str(path), test_fraction=0.5)))
    with pytest.raises(LabelError, match="there are no test images"):
        match_labels(open_dataset(DataConfig(source=str(path), test_fraction=0.0)))


def test_held_out_images_need_no_matching() -> None:
    dataset = open_dataset(DataConfig(source="digits", num_images=100))
    labels = match_labels(dataset)
    assert labels.of_test is labels.of_training and not labels.remarks
    assert np.array_equal(labels.training_ids, dataset.training_ids)
    assert np.array_equal(labels.test_ids, dataset.test_ids)


def test_numbers_without_names_are_matched_as_numbers(tmp_path: Path) -> None:
    training = _write_parquet(tmp_path / "a.parquet", [0, 1, 2, 4, -1, None])
    labels = match_labels(_open_both(training, _write_parquet(tmp_path / "b.parquet", [4.0, 3.0, None, 0.0])))
    assert labels.training_ids.tolist() == [0, 1, 2, 3]
    assert labels.of_test.tolist() == [4, UNLABELLED, UNLABELLED, 0]
    assert labels.remarks[0].endswith(": 3")


def test_accents_are_one_name_however_they_are_written(tmp_path: Path) -> None:
    training = _write(tmp_path / "a", "folder", ["tea", "u\N{COMBINING DIAERESIS}"])
    test = _write(tmp_path / "b", "strings", ["tea", "\N{LATIN SMALL LETTER U WITH DIAERESIS}"])
    assert match_labels(_open_both(training, test)).of_test.tolist() == [0, 1]


def test_names_that_two_classes_share_are_fine_until_they_must_tell_classes_apart(tmp_path: Path) -> None:
    cranes = ["crane", "owl", "crane"]
    training = _write_parquet(tmp_path / "a.parquet", [0, 1, 2], names=cranes)
    same = _write_parquet(tmp_path / "b.parquet", [2, 1, 1, 0], names=cranes)
    assert match_labels(_open_both(training, same)).of_test.tolist() == [2, 1, 1, 0]
    with pytest.raises(DataError, match="two classes of the training images have the name 'crane'"):
        match_labels(_open_both(training, _write(tmp_path / "c", "strings", ["crane", "owl"])))


def test_what_cannot_be_matched_is_refused_with_both_sides_and_advice(tmp_path: Path) -> None:
    names = _write(tmp_path / "names", "folder", ["0", "1"])
    numbers = _write_parquet(tmp_path / "numbers.parquet", [0, 1])
    others = _write(tmp_path / "others", "strings", ["2", "3"])
    advice = r". Give both sides names \(.*--tracking.knn_images 0$"
    with pytest.raises(
        DataError, match=r"training has the names '0', '1', test has the numbers 0, 1 without names" + advice
    ):
        match_labels(_open_both(names, numbers))
    with pytest.raises(
        DataError, match=r"training has the numbers 0, 1 without names, test has the names '0', '1'" + advice
    ):
        match_labels(_open_both(numbers, names))
    with pytest.raises(
        DataError, match=r"no class of the test images is one of the training images: .*'2', '3'" + advice
    ):
        match_labels(_open_both(names, others))


def test_test_images_that_are_the_training_images_are_refused(tmp_path: Path) -> None:
    training = _write(tmp_path / "training", "folder", ["ant", "bee", "cat"])
    shutil.copytree(training, tmp_path / "copy")
    for test in (training, tmp_path / "copy"):
        with pytest.raises(
            DataError, match="training and test images are the same images: .*leave data.test_source out"
        ):
            match_labels(_open_both(training, test))
    # Alike in names and sizes only: other images.
    (tmp_path / "copy" / "ant" / "0.png").write_bytes(bytes(len(_image(0))))
    assert match_labels(_open_both(training, tmp_path / "copy")).test_ids.tolist() == [0, 1, 2]


LABEL_COLUMNS: dict[str, tuple[pa.Array, list[int], tuple[str, ...]]] = {
    "strings": (pa.array(["b", None, "a", "b"]), [1, -1, 0, 1], ("a", "b")),
    "large strings": (pa.array(["b", None, "a", "b"], pa.large_string()), [1, -1, 0, 1], ("a", "b")),
    "views of strings": (pa.array(["b", None, "a", "b"], pa.string_view()), [1, -1, 0, 1], ("a", "b")),
    "categories": (pa.array(["b", None, "a", "b"]).dictionary_encode(), [1, -1, 0, 1], ("a", "b")),
    "categories of numbers": (pa.array([7, None, 3]).dictionary_encode(), [7, -1, 3], ()),
    "booleans": (pa.array([True, None, False]), [1, -1, 0], ()),
    "floats": (pa.array([2.0, None, float("nan"), -0.0]), [2, -1, -1, 0], ()),
    "half floats": (pa.array(np.array([2.0, 1.0], np.float16)), [2, 1], ()),
    "unsigned": (pa.array([2, None, 200], pa.uint8()), [2, -1, 200], ()),
}


@pytest.mark.parametrize("kind", list(LABEL_COLUMNS))
def test_column_of_labels_may_have_any_type_that_can_name_classes(tmp_path: Path, kind: str) -> None:
    column, expected, names = LABEL_COLUMNS[kind]
    source = open_any(_write_parquet(tmp_path / "a.parquet", column))
    assert source.has_labels
    assert source.load_labels().tolist() == expected
    assert source.load_class_names() == names


def test_files_of_one_source_are_matched_by_name_too(tmp_path: Path) -> None:
    _write_parquet(tmp_path / "a.parquet", ["dog", "cat", "dog"])
    _write_parquet(tmp_path / "b.parquet", [None, "ant"])
    _write_parquet(tmp_path / "c.parquet", [1, 0, -1], names=["cat", "bee"])
    source = open_any(tmp_path)
    assert source.load_class_names() == ("ant", "bee", "cat", "dog")
    assert source.load_labels().tolist() == [3, 2, 3, -1, 0, 1, 2, -1]


def test_list_of_names_keeps_its_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _write_parquet(tmp_path / f"{name}.parquet", [1, 0], names=["dog", "cat"])
    source = open_any(tmp_path)
    assert source.load_class_names() == ("dog", "cat")
    assert source.load_labels().tolist() == [1, 0, 1, 0]


UNUSABLE: dict[str, tuple[pa.Array | list[object] | None, str]] = {
    "lists": (pa.array([[1], [2, 3]]), r"has type list<.*--data.label_column"),
    "bytes": (pa.array([b"a", b"b"]), r"has type binary"),
    "empty": (pa.nulls(2), "is empty"),
    "missing": (None, r"has no column of labels; it has \['image'\]. Name the column of labels by --data.label_column"),
    "fractions": ([0.5, 1.0], r"holds fractions \(0.5, ...\); expected classes"),
    "infinite": ([float("inf"), 1.0], "has values from 1 to 1152921504606846976"),
    "negative": ([-7, 1], "has values from -7 to 1; expected classes from 0 to 1048575, or -1 for none"),
    "beyond 64 bits": (pa.array([2**63, 1], pa.uint64()), "has values from -9223372036854775808 to 1"),
}


@pytest.mark.parametrize("kind", list(UNUSABLE))
def test_labels_that_cannot_be_used_leave_the_images_usable(tmp_path: Path, kind: str) -> None:
    column, reason = UNUSABLE[kind]
    source = open_any(_write_parquet(tmp_path / "a.parquet", column))
    assert source.read([1]) == [_image(1)]
    with pytest.raises(LabelError, match=rf"{tmp_path}/a.parquet.*{reason}"):
        source.load_labels()


def test_more_classes_than_names_are_no_labels(tmp_path: Path) -> None:
    source = open_any(_write_parquet(tmp_path / "a.parquet", [0, 2], names=["cat", "dog"]))
    with pytest.raises(LabelError, match="has values from 0 to 2; expected classes from 0 to 1"):
        source.load_labels()


@pytest.mark.parametrize(
    "metadata", ["{", "[]", "[" * 9_000, '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}']
)
def test_metadata_that_are_none_of_hugging_face_give_no_names(tmp_path: Path, metadata: str) -> None:
    path = _write_parquet(tmp_path / "a.parquet", [0, 2])
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": metadata}), path)
    assert open_any(path).load_class_names() == ()


def test_some_files_without_labels_or_without_names_are_counted(tmp_path: Path) -> None:
    for name, labels in {"a": [0], "b": None, "c": [1]}.items():
        _write_parquet(tmp_path / "some" / f"{name}.parquet", labels)
    source = open_any(tmp_path / "some")
    assert not source.has_labels
    with pytest.raises(LabelError, match=r"1 of 3 files have no labels; .*b.parquet has no column of labels"):
        source.load_labels()
    for name, labels in {"a": [0], "b": ["cat"], "c": pa.array([None], pa.string())}.items():
        _write_parquet(tmp_path / "mixed" / f"{name}.parquet", labels)
    with pytest.raises(LabelError, match=r"1 of 2 files have names of classes, the others only numbers"):
        open_any(tmp_path / "mixed").load_labels()


def test_reasons_for_no_labels_are_those_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for index in range(5):
        (tmp_path / "flat" / f"{index}.png").write_bytes(_image(index))
    with pytest.raises(LabelError, match="has no labels: all images lie in it directly, none in a class folder"):
        match_labels(open_dataset(DataConfig(source=str(tmp_path / "flat"))))
    with pytest.raises(LabelError, match="there are no test images; name some by data.test_source"):
        match_labels(open_dataset(DataConfig(source="digits", test_fraction=0.0)))
    nothing = _write_parquet(tmp_path / "a.parquet", pa.array([None, None], pa.int64()))
    with pytest.raises(LabelError, match="none of the 2 test images has a label"):
        match_labels(_open_both(_write_parquet(tmp_path / "b.parquet", [0, 1]), nothing))


@pytest.mark.parametrize("kind", ["folder", "class label"])
def test_packed_shards_keep_labels_and_names(tmp_path: Path, kind: str) -> None:
    whole = open_any(_write(tmp_path / "whole", kind, ["ant", "bee", "bee"]))
    pack_here(tmp_path / "whole", tmp_path / "shards")
    packed = open_any(tmp_path / "shards")
    assert packed.load_class_names() == whole.load_class_names() != ()
    assert packed.load_labels().tolist() == whole.load_labels().tolist()
    test = _write(tmp_path / "test", "strings", ["bee", "cow"])
    assert match_labels(_open_both(tmp_path / "shards", test)).of_test.tolist() == [packed.load_labels()[1], UNLABELLED]


def test_packing_does_without_labels_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pack_here(_write_parquet(tmp_path / "b.parquet", [0.5, 1.0]), tmp_path / "plain")
    assert "images are packed without labels: " in caplog.text and "holds fractions" in caplog.text
    with pytest.raises(LabelError, match="it was packed from images without usable labels"):
        open_any(tmp_path / "plain").load_labels()


@pytest.mark.parametrize("kind", ["folder", "strings"])
def test_test_images_that_are_also_trained_on_are_refused(tmp_path: Path, kind: str) -> None:
    _write(tmp_path / "root", kind, ["ant", "bee"])
    (tmp_path / "link").symlink_to(tmp_path / "root")
    if kind == "folder":
        inner = _write(tmp_path / "root" / "extra", kind, ["ant", "bee", "bee"])
        hidden = _write(tmp_path / "root" / ".extra", kind, ["ant", "bee", "bee"])
    else:
        inner = tmp_path / "root" / "all*.parquet"
        _write_parquet(tmp_path / "root" / "other.parquet", ["ant", "bee"])
        hidden = _write_parquet(tmp_path / "root" / ".hidden.parquet", ["ant", "bee", "bee"])
    for one, other in [(tmp_path / "link", inner), (inner, tmp_path / "link")]:
        with pytest.raises(DataError, match="are also training images.*the nearest neighbour of each would be itself"):
            match_labels(_open_both(one, other))
    beside = _write(tmp_path / "root-2", kind, ["ant", "bee", "bee"])
    for apart in (hidden, beside):
        assert len(match_labels(_open_both(tmp_path / "root", apart)).test_ids) == 3
