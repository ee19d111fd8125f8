"""Sources (folders, Parquet, digits), and the messages if they cannot be used."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from hvp_ray.config import DataConfig
from hvp_ray.data import digits as digits_module
from hvp_ray.data import parquet_footer
from hvp_ray.data.file_set import FileSet
from hvp_ray.data.parquet import ParquetSource
from hvp_ray.data.source import Source, open_source
from hvp_ray.errors import ConfigError, DataError
from tests.helpers import encode

IMAGE = encode(np.zeros((4, 5, 3), np.uint8))


def _open(source: object, **options: object) -> Source:
    return open_source(str(source), DataConfig(source=str(source), **options))


def _write_folder(root: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.PNG", "dog/3.jpg", ".hidden/4.png", "dog/notes.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGE if path.suffix.lower() in (".png", ".jpg") else b"text")


def test_folder_has_sorted_images_with_the_first_folder_as_class(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    source = _open(tmp_path)
    assert source.num_samples == 3
    assert source.load_labels().tolist() == [0, 0, 1]
    assert source.describe(1).endswith("cat/deep/2.PNG")
    assert source.read([2, 0]) == [IMAGE, IMAGE]


def test_folder_without_classes_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    assert not _open(tmp_path).has_labels


def test_folder_fingerprint_changes_with_names_and_sizes(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    before = _open(tmp_path).fingerprint()
    assert before == _open(tmp_path).fingerprint()
    (tmp_path / "cat/1.png").write_bytes(IMAGE + b"x")
    assert _open(tmp_path).fingerprint() != before


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    """Root may read everything; nobody may not."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_file_that_is_gone_or_forbidden_is_no_bytes_while_others_can_be_opened(
    public_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(5):
        (public_folder / f"{index}.png").write_bytes(b"%d" % index)
    source = _open(public_folder)
    (public_folder / "1.png").unlink()
    (public_folder / "2.png").chmod(0)
    with _as_nobody():
        assert source.read([0, 1, 2, 3]) == [b"0", b"", b"", b"3"]
        assert source.read([1]) == [b""]
    assert "1.png cannot be opened (No such file or directory)" in caplog.text
    assert "2.png cannot be opened (Permission denied)" in caplog.text


@pytest.mark.parametrize("change", ["empty", "gone", "forbidden"])
def test_storage_that_is_gone_is_an_error(public_folder: Path, change: str) -> None:
    """As an unmounted disk is: an empty folder, or none."""
    folder = public_folder / "class"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.png").write_bytes(b"image")
    source = _open(public_folder)
    if change == "forbidden":
        folder.chmod(0)
    else:
        folder.rename(public_folder / "elsewhere")
    if change == "empty":
        folder.mkdir()
    with _as_nobody(), pytest.raises(OSError, match=r"none of the files below .* can be opened.*\d+\.png"):
        source.read([3])


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails, as Linux has one")
def test_file_that_cannot_be_read_to_its_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"image")
    (tmp_path / "2.png").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        _open(tmp_path).read([0, 1])


def _table(num_rows: int, column: str = "image") -> pa.Table:
    images = [{"bytes": encode(np.full((3, 3, 3), i % 256, np.uint8)), "path": f"{i}.png"} for i in range(num_rows)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({column: pa.array(images, kind), "label": pa.array(range(num_rows), pa.int64())})


def test_parquet_reads_any_rows_in_any_order_over_files_and_row_groups(tmp_path: Path) -> None:
    pq.write_table(_table(25), tmp_path / "a.parquet", row_group_size=10)
    pq.write_table(_table(7), tmp_path / "b.parquet", row_group_size=3)
    source = _open(tmp_path)
    assert source.num_samples == 32
    assert source.block_starts is not None
    assert source.block_starts.tolist() == [0, 10, 20, 25, 28, 31]
    assert source.load_labels().tolist() == [*range(25), *range(7)]
    expected = [_table(25)["image"][24].as_py()["bytes"], _table(7)["image"][0].as_py()["bytes"]]
    assert source.read([24, 25]) == expected
    assert source.read([25, 24]) == expected[::-1]
    assert source.describe(30) == f"{tmp_path}/b.parquet row 5"


def test_parquet_cache_is_bounded_and_a_batch_reads_no_row_group_twice(tmp_path: Path) -> None:
    pq.write_table(_table(40), tmp_path / "a.parquet", row_group_size=10)
    config = DataConfig(source="x", max_row_group_mib=1, max_image_mib=1)
    source = ParquetSource(FileSet(str(tmp_path)), config, cache_bytes=1)
    opened = source.num_bytes_read
    source.read([0, 39, 1, 38, 2, 37])
    twice = source.num_bytes_read - opened
    source.read([11])
    assert source.num_bytes_read - opened == pytest.approx(1.5 * twice, rel=0.3)


def test_parquet_is_read_in_the_calling_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of Arrow that releases a Python object while the interpreter ends aborts the process."""
    threads: set[int] = set()
    read = parquet_footer._Window.read

    def read_and_note(window: Any, size: int | None = -1, /) -> bytes:
        threads.add(threading.get_ident())
        return read(window, size)

    monkeypatch.setattr(parquet_footer._Window, "read", read_and_note)
    pq.write_table(_table(40), tmp_path / "a.parquet", row_group_size=10)
    assert len(_open(tmp_path).read([0, 15, 39])) == 3
    assert threads == {threading.get_ident()}


def test_null_images_come_as_no_bytes(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array([None, {"bytes": IMAGE, "path": ""}], kind)}), tmp_path / "a.parquet")
    assert _open(tmp_path).read([0, 1]) == [b"", IMAGE]


def test_digits_are_1797_labelled_images() -> None:
    source = _open("digits")
    assert source.num_samples == 1797
    assert np.bincount(source.load_labels()).min() > 170
    assert source.read([5])[0].startswith(b"\x89PNG")


def test_digits_are_those_of_scikit_learn() -> None:
    rows, digits = digits_module._load_rows(), load_digits()
    np.testing.assert_array_equal(rows[:, :-1], digits.data)
    np.testing.assert_array_equal(rows[:, -1], digits.target)


def test_unusable_sources_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nonsense")
    (tmp_path / "file.bin").write_bytes(b"x")
    pq.write_table(_table(3, column="picture"), tmp_path / "column.parquet")
    pq.write_table(pa.table({"vector": [b"1"], "label": [1]}), tmp_path / "bytes.parquet")
    pq.write_table(pa.table({"image": [1, 2]}), tmp_path / "type.parquet")
    pq.write_table(_table(0), tmp_path / "rows.parquet")
    cases = {
        "absent": "does not exist",
        "empty": r"no images in .* \(0 files",
        "texts": r"no images in .* \(1 files",
        "broken.parquet": "cannot be read as Parquet",
        "file.bin": "no known format; expected .* WebDataset",
        "bytes.parquet": r"no column of images; it has \['vector', 'label'\].*--data.image_column",
        "type.parquet": "has type int64; expected struct",
        "rows.parquet": "has no rows",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            _open(tmp_path / name)
    with pytest.raises(DataError, match=r"hf://datasets/OWNER/NAME"):
        _open("https://example.org/x.parquet")
    with pytest.raises(ConfigError, match=r"ftp.*expected a folder, or a URI"):
        _open("ftp://host/x.parquet")
    with pytest.raises(DataError, match=r"no column 'image'; it has \['picture', 'label'\].*--data.image_column"):
        _open(tmp_path / "column.parquet", image_column="image")
    assert _open(tmp_path / "column.parquet").num_samples == 3
    assert _open(tmp_path / "bytes.parquet", image_column="vector").read([0]) == [b"1"]


def test_class_folders_may_lie_in_one_folder_of_the_folder(tmp_path: Path) -> None:
    def classes(*names: str) -> list[str]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(IMAGE)
        source = _open(root)
        return [source.load_class_names()[label] for label in source.load_labels().tolist()]

    assert classes("data/images/cat/1.png", "data/images/cat/2/3.png", "data/images/dog/4.png") == ["cat", "cat", "dog"]
    assert classes("animal/cat/1.png", "animal/dog/2.png", "plant/oak/3.png") == ["animal", "animal", "plant"]
    assert classes("cat/1.png", "cat/2.png") == ["cat", "cat"]
    assert classes("cat/1.png", "cat/old/2.png", "cat/new/3.png") == ["cat", "cat", "cat"]
