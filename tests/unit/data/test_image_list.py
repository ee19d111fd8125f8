"""Image lists in CSV, TSV and Parquet: paths and labels found, missing files replaced, and one sentence for each mistake."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvp_ray.data.image_files import ImageFiles
from hvp_ray.errors import DataError, LabelError
from tests.helpers import encode
from tests.unit.data.made import content_of, open_any, pack_here

IMAGES = [encode(np.full((4, 5, 3), level, np.uint8)) for level in (10, 20, 30)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index, image in enumerate(IMAGES):
        path = tmp_path / "images" / "deep" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return tmp_path


def _write(path: Path, header: str, *lines: str) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_list_gives_images_in_its_order_with_relative_and_absolute_paths(root: Path) -> None:
    absolute = root / "images" / "deep" / "0.png"
    listed = _write(
        root / "list.csv", "id,filename,class", "7,images/deep/2.png,dog", f'8,"{absolute}",cat', "9,images/deep/2.png,"
    )
    source = open_any(listed)
    assert source.kind == "images of a list"
    assert source.read([0, 1, 2]) == [IMAGES[2], IMAGES[0], IMAGES[2]]
    assert source.load_labels().tolist() == [1, 0, -1]
    assert source.load_class_names() == ("cat", "dog")
    assert source.describe(0) == f"{root}/images/deep/2.png"
    assert source.num_bytes == sum(map(len, (IMAGES[2], IMAGES[0], IMAGES[2])))


def test_formats_of_lists_are_equal(root: Path) -> None:
    rows = [(f"images/deep/{index}.png", label) for index, label in ((2, 4), (0, 0), (1, 4))]
    tables = {"file_path": [path for path, _ in rows], "label": [label for _, label in rows], "sha256": [b"0"] * 3}
    pq.write_table(pa.table(tables), root / "list.parquet", row_group_size=2)
    lists = [
        root / "list.parquet",
        _write(root / "list.csv", "file_path,label", *(f"{path},{label}" for path, label in rows)),
        _write(root / "list.tsv", "label\tfile_path", *(f"{label}\t{path}" for path, label in rows)),
    ]
    sources = [open_any(path) for path in lists]
    for source in sources:
        assert source.read([0, 1, 2]) == [IMAGES[2], IMAGES[0], IMAGES[1]]
        assert (source.load_labels().tolist(), source.load_class_names()) == ([4, 0, 4], ())
        assert source.fingerprint() == sources[0].fingerprint()


def test_names_of_a_class_label_are_those_of_a_parquet_list(root: Path) -> None:
    features = '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    table = pa.table({"path": ["images/deep/0.png", "images/deep/1.png"], "label": [1, 0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": features}), root / "list.parquet")
    source = open_any(root / "list.parquet")
    assert (source.load_labels().tolist(), source.load_class_names()) == ([1, 0], ("cat", "dog"))


def test_missing_file_is_no_bytes_and_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = _write(root / "list.csv", "path", "images/deep/0.png", "images/deep/gone.png", '""', "images/deep/1.png")
    source = open_any(listed)
    assert source.num_samples == 4
    assert source.read([0, 1, 2, 3]) == [IMAGES[0], b"", b"", IMAGES[1]]
    assert "gone.png cannot be opened (No such file or directory) and counts as unreadable" in caplog.text
    with pytest.raises(LabelError, match=r"has no column of labels; it has \['path'\]"):
        source.load_labels()


def test_lists_are_packed_under_the_names_of_their_images(root: Path, tmp_path: Path) -> None:
    listed = _write(root / "list.csv", "path,label", *(f"images/deep/{index}.png,{index}" for index in (2, 0)))
    pack_here(listed, tmp_path / "shards")
    packed = open_any(tmp_path / "shards")
    assert packed.read([0, 1]) == [IMAGES[2], IMAGES[0]]
    assert packed.load_labels().tolist() == [2, 0]
    shard = pa.ipc.open_file(pa.py_buffer(content_of(tmp_path / "shards")["shard-000000-0000.arrow"])).read_all()
    assert shard["path"].to_pylist() == ["images/deep/2.png", "images/deep/0.png"]


def test_list_shares_files_with_the_folder_of_its_images(root: Path) -> None:
    listed = open_any(_write(root / "list.csv", "path", "images/deep/1.png"))
    (root / "link").symlink_to(root / "images")
    (root / "other").mkdir()
    (root / "other" / "1.png").write_bytes(IMAGES[0])
    assert listed.shares_files_with(open_any(root / "link"))
    assert open_any(root / "images").shares_files_with(listed)
    assert not listed.shares_files_with(open_any(root / "other"))


def test_table_beside_images_is_no_list(root: Path) -> None:
    _write(root / "labels.csv", "path,label", "images/deep/1.png,0")
    source = open_any(root)
    assert isinstance(source, ImageFiles)
    assert (source.kind, source.num_samples) == ("images in a folder", 3)
    assert [entry.reason for entry in source.left_out] == [".csv files"]


def test_folder_of_lists_says_to_name_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.png"]}), tmp_path / "train.parquet")
    with pytest.raises(
        DataError, match=r"has no column of images; it has \['path'\].*as an image list, name the file itself"
    ):
        open_any(tmp_path)


MISTAKES = {
    "no paths": (("name,label", "x,1"), r"has no column of paths; it has \['name', 'label'\].*--data.image_column"),
    "several": (("image_path,mask_path", "a,b"), r"\['image_path', 'mask_path'\]. Choose one by --data.image_column"),
    "no header": (("images/deep/0.png,1", "images/deep/1.png,0"), "has no line of column names; add one"),
    "nothing there": (("path", "gone.png", "too.png"), "none of the 2 files of .*list.csv exists.*gone.png.*relative"),
    "no rows": (("path,label",), "has no rows"),
    "ragged": (("path,label", "images/deep/0.png,1,2"), "cannot be read as an image list: .*Expected 2 columns, got 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(root: Path, name: str) -> None:
    lines, reason = MISTAKES[name]
    with pytest.raises(DataError, match=reason) as raised:
        open_any(_write(root / "list.csv", *lines))
    assert "\n" not in str(raised.value)


def test_list_at_a_uri_is_refused(root: Path) -> None:
    listed = _write(root / "list.csv", "path", "images/deep/1.png")
    with pytest.raises(DataError, match="lists and their images are read from this machine only"):
        open_any(listed.as_uri())
