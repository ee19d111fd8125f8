"""Columns of images, paths and labels are found by type and name, and never guessed among several."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvp_ray.data.columns import Column, find_images, find_labels, find_paths, listed_names
from hvp_ray.errors import DataError, LabelError
from tests.unit.data.made import PARQUET_TYPE as IMAGE
from tests.unit.data.made import open_any

BINARY, TEXT, NUMBER = pa.binary(), pa.string(), pa.int64()


def _class_label(*columns: str) -> dict[str, str]:
    features = {column: {"names": ["cat", "dog"], "_type": "ClassLabel"} for column in columns}
    return {"huggingface": json.dumps({"info": {"features": features}})}


FOUND = {
    "Hugging Face": ({"image": IMAGE, "label": NUMBER}, "image", "label"),
    "struct of another name": ({"img": IMAGE, "fine": NUMBER, "target": TEXT}, "img", "target"),
    "bytes": ({"jpg": BINARY, "cls": NUMBER}, "jpg", "cls"),
    "camel case": ({"imageBytes": pa.large_binary(), "className": TEXT}, "imageBytes", "className"),
    "digest beside bytes": ({"sha256": BINARY, "image_content": BINARY}, "image_content", ""),
    "struct beside bytes": ({"thumbnail_png": BINARY, "picture": IMAGE}, "picture", ""),
    "image among others": ({"mask": IMAGE, "image": IMAGE, "depth": IMAGE}, "image", ""),
    "label among others": ({"image": IMAGE, "label": NUMBER, "class": TEXT, "target": NUMBER}, "image", "label"),
    "nested": (
        {"sample": pa.struct([("image", IMAGE), ("tags", pa.struct([("category", TEXT)]))])},
        "sample.image",
        "sample.tags.category",
    ),
    "no labels": ({"image": IMAGE, "id": NUMBER, "url": TEXT}, "image", ""),
}


@pytest.mark.parametrize("name", FOUND)
def test_columns_are_found_by_type_and_name(name: str) -> None:
    columns, image, label = FOUND[name]
    schema = pa.schema(columns)
    assert find_images(schema, None) == Column(path=image)
    assert find_labels(schema, None).path == label
    assert bool(find_labels(schema, None).problem) == (label == "")


def test_the_only_class_label_is_the_label_whatever_its_name() -> None:
    columns = {"image": IMAGE, "plant": NUMBER, "class_of_soil": NUMBER}
    assert find_labels(pa.schema(columns, metadata=_class_label("plant")), None).path == "plant"
    assert listed_names(pa.schema(columns, metadata=_class_label("plant")), "plant") == ("cat", "dog")
    assert find_labels(pa.schema(columns), None).path == "class_of_soil"
    both = find_labels(pa.schema(columns, metadata=_class_label("plant", "class_of_soil")), None)
    assert "['plant', 'class_of_soil']. Choose one by --data.label_column" in both.problem


@pytest.mark.parametrize("column", ["left", "right"])
def test_several_images_are_an_error_that_names_them_and_the_option(tmp_path: object, column: str) -> None:
    rows = {name: pa.array([{"bytes": name.encode(), "path": ""}], IMAGE) for name in ("left", "right")}
    path = f"{tmp_path}/a.parquet"
    pq.write_table(pa.table(rows | {"fine_label": [3], "coarse_label": ["x"]}), path)
    with pytest.raises(DataError, match=r"2 columns that may hold images: \['left', 'right'\].*--data.image_column"):
        open_any(path)
    source = open_any(path, image_column=column)
    assert source.read([0]) == [column.encode()]
    assert not source.has_labels
    with pytest.raises(LabelError, match=r"\['fine_label', 'coarse_label'\]. Choose one by --data.label_column"):
        source.load_labels()
    assert open_any(path, image_column=column, label_column="coarse_label").load_class_names() == ("x",)
    other = open_any(path, image_column={"left": "right", "right": "left"}[column])
    assert other.fingerprint() != source.fingerprint()


def test_nested_images_and_labels_are_read_null_structs_too(tmp_path: object) -> None:
    kind = pa.struct([("image", IMAGE), ("class", TEXT)])
    rows = [{"image": {"bytes": b"one", "path": ""}, "class": "b"}, None, {"image": None, "class": "a"}]
    rows.append({"image": {"bytes": b"four", "path": ""}, "class": None})
    pq.write_table(pa.table({"sample": pa.array(rows, kind)}), f"{tmp_path}/a.parquet", row_group_size=2)
    source = open_any(tmp_path)
    assert source.read([3, 0, 1, 2]) == [b"four", b"one", b"", b""]
    assert source.load_labels().tolist() == [1, -1, 0, -1]
    assert source.load_class_names() == ("a", "b")


def test_paths_are_texts_that_are_called_so() -> None:
    assert find_paths(pa.schema({"file_name": TEXT, "label": NUMBER, "caption": TEXT}), None).path == "file_name"
    assert find_paths(pa.schema({"path": TEXT, "image_url_file": TEXT}), None).path == "path"
    several = find_paths(pa.schema({"image_path": TEXT, "mask_path": TEXT}), None)
    assert "['image_path', 'mask_path']. Choose one by --data.image_column" in several.problem
    assert find_paths(pa.schema({"image_path": TEXT, "mask_path": TEXT}), "mask_path").path == "mask_path"
    assert "has type int64; expected paths of images" in find_paths(pa.schema({"path": NUMBER}), None).problem
