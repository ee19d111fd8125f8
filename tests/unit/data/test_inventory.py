"""The inventory counts exactly what a source reads, and names what it leaves out, with the reason."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hvp_ray.config import DataConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.data.decode import decode_rgb
from hvp_ray.data.image_suffixes import IMAGE_SUFFIXES
from hvp_ray.data.inventory import DataInventory, take_inventory
from hvp_ray.data.source import Source
from hvp_ray.errors import DataError
from tests.helpers import encode
from tests.unit.data.made import open_any, write_parquet

IMAGE = encode(np.zeros((4, 5, 3), np.uint8))


def _write(root: Path, *names: str, content: bytes = IMAGE) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def _paths(source: Source, root: Path) -> list[str]:
    return [
        Path(source.describe(index).partition(" row ")[0]).relative_to(root).as_posix()
        for index in range(source.num_samples)
    ]


def _left_out(source: Source) -> dict[str, tuple[int, str]]:
    return {entry.reason: (entry.count, entry.example) for entry in source.left_out}


def _inventory(**options: object) -> DataInventory:
    config = DataConfig(**options)  # type: ignore[arg-type]
    return take_inventory(open_dataset(config), config)


def test_what_is_left_out_is_counted_by_reason_with_the_first_of_each(tmp_path: Path) -> None:
    _write(tmp_path, "a/1.png", "b/2.JFIF", "a/3.jxl", "b/4.JXL", "b/5", "a/6.md", ".git/7.png", "b/.8.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    source = open_any(tmp_path)
    assert _paths(source, tmp_path) == ["a/1.png", "b/2.JFIF"]
    assert _left_out(source) == {
        ".jxl files": (2, "a/3.jxl"),
        "hidden": (2, ".git"),
        ".md files": (1, "a/6.md"),
        "files without a suffix": (1, "b/5"),
        "broken links, loops, pipes or devices": (1, "a/gone.png"),
    }


def test_inventory_names_images_classes_bytes_and_images_that_lack_their_suffix(tmp_path: Path) -> None:
    _write(tmp_path, *(f"{label}/{index}.png" for label in "abc" for index in range(10)), "a/x", "a/y.txt")
    inventory = _inventory(source=str(tmp_path), test_fraction=0.2)
    assert inventory.lines() == [
        f"data     {tmp_path}, images in a folder: 30 images, 3 classes, 0.0 MB, 24 to train on, 6 held out for evaluation",
        "left out 1 .txt file (the first: a/y.txt: a PNG by its first bytes; to have it read, rename it to end in .png); "
        "1 file without a suffix (the first: a/x: a PNG by its first bytes; to have it read, rename it to end in .png)",
    ]
    kept = inventory.to_dict()
    assert kept["source"]["num_images"] == 30 and kept["source"]["num_bytes"] == 30 * len(IMAGE)
    assert kept["source"]["left_out"][0]["example"] == "a/y.txt"
    (few, *_) = _inventory(source=str(tmp_path), test_fraction=0.2, num_images=20).lines()
    assert few.endswith(
        "30 images, 3 classes, 0.0 MB, 16 to train on, 4 held out for evaluation, 10 not used (data.num_images)"
    )
    _write(tmp_path / "test", "a/1.png")
    both = _inventory(source=str(tmp_path / "a"), test_source=str(tmp_path / "test"))
    assert both.source.num_classes is None and both.test_source is not None
    assert (both.test_source.num_images, both.test_source.num_classes, both.num_test_images) == (1, 1, 1)
    assert [line.split()[0] for line in both.lines()] == ["data", "left", "test"]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_that_is_read_can_be_decoded(suffix: str, tmp_path: Path) -> None:
    kinds = {".jif": "JPEG", ".pjpeg": "JPEG", ".pjp": "JPEG"} | dict.fromkeys((".heic", ".heif", ".hif"), "HEIF")
    if suffix in (".heic", ".heif", ".hif"):
        pytest.importorskip("pillow_heif")
    image = Image.new({".pbm": "1", ".pgm": "L", ".pfm": "F"}.get(suffix, "RGB"), (6, 5), 1)
    image.save(tmp_path / f"1{suffix}", format=kinds.get(suffix, Image.registered_extensions().get(suffix)))
    source = open_any(tmp_path)
    assert decode_rgb(source.read([0])[0], max_pixels=100, intensity_range=(0.0, 1.0)).shape == (5, 6, 3)


@pytest.mark.parametrize("depth", ["", "all/Data"])
@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test"), ("train", "valid", "extra")])
def test_folders_of_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...], depth: str) -> None:
    place = _write(tmp_path / depth, *(f"{name}/{label}/1.png" for name in names for label in "ab"))
    with pytest.raises(DataError, match="several splits") as raised:
        open_any(tmp_path)
    assert f"--data.source {place}/{names[0]} --data.test_source {place}/{names[1]}" in str(raised.value)
    assert open_any(place / names[0]).num_samples == 2


def test_class_that_is_called_train_is_one(tmp_path: Path) -> None:
    source = open_any(_write(tmp_path, "train/1.png", "bus/1.png", "plane/test/1.png", "plane/train/1.png"))
    assert source.load_labels().tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (
            ("data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"),
            ("data/train-*.parquet", "data/test-*.parquet"),
        ),
        (("x.train.parquet", "x.validation.parquet"), ("x.train.parquet", "x.validation.parquet")),
        (("Train/0.parquet", "dev/0.parquet"), ("Train", "dev")),
    ],
)
def test_parquet_files_of_splits_are_not_trained_on_together(
    tmp_path: Path, names: tuple[str, ...], advice: tuple[str, str]
) -> None:
    for name in names:
        write_parquet(tmp_path / name, [IMAGE] * 2, row_group_size=2)
    for location in (str(tmp_path), tmp_path.as_uri()):
        with pytest.raises(DataError, match="several splits") as raised:
            open_any(location)
        training, test = (f"{location}/{pattern}" for pattern in advice)
        assert f"--data.source '{training}' --data.test_source '{test}'" in str(raised.value)
        assert open_any(training).num_samples == 2 * (len(names) - 1)
        assert open_any(test).num_samples == 2


@pytest.mark.parametrize(
    "names",
    [
        ("train/test-0.parquet", "train/1.parquet"),
        ("test.parquet", "dev.parquet"),
        ("training.parquet", "test.parquet"),
    ],
)
def test_parquet_files_without_a_training_split_and_another_are_one_source(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        write_parquet(tmp_path / name, [IMAGE] * 2, row_group_size=2)
    assert open_any(tmp_path).num_samples == 4


def test_hidden_folders_below_parquet_files_are_not_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", [IMAGE] * 3, row_group_size=2)
    for hidden in (".ipynb_checkpoints/a.parquet", ".git/annex/objects/x.parquet", "data/.old/a.parquet"):
        write_parquet(tmp_path / hidden, [IMAGE] * 3, row_group_size=2)
    for location in (str(tmp_path), tmp_path.as_uri()):
        source = open_any(location)
        assert source.num_samples == 3
        assert _left_out(source) == {"hidden": (3, ".git")}


def test_links_to_folders_of_parquet_files_are_followed_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_parquet(root / "a" / "1.parquet", [IMAGE] * 2, row_group_size=2)
    write_parquet(tmp_path / "outside" / "2.parquet", [IMAGE] * 3, row_group_size=2)
    (root / "b").symlink_to(tmp_path / "outside")
    (root / "c").symlink_to(tmp_path / "outside")
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "up").symlink_to(tmp_path)
    source = open_any(root)
    assert source.num_samples == 5
    assert source.describe(4) == f"{root}/b/2.parquet row 2"


def test_tables_beside_images_do_not_take_their_place(tmp_path: Path) -> None:
    _write(tmp_path, "a/1.png", "b/2.png")
    digest = pa.array([b"0"], pa.binary())
    pq.write_table(pa.table({"file_name": ["a/1.png"], "sha256": digest}), tmp_path / "metadata.parquet")
    write_parquet(tmp_path / ".cache" / "x.parquet", [IMAGE], row_group_size=1)
    source = open_any(tmp_path)
    assert source.kind == "images in a folder"
    assert _paths(source, tmp_path) == ["a/1.png", "b/2.png"]
    assert _left_out(source) == {".parquet files": (1, "metadata.parquet"), "hidden": (1, ".cache")}


def test_pictures_beside_parquet_files_with_images_do_not_take_their_place(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "a.parquet", [IMAGE] * 3, row_group_size=2)
    _write(tmp_path, "logo.png", "README.md")
    for location in (str(tmp_path), tmp_path.as_uri()):
        source = open_any(location)
        assert (source.kind, source.num_samples) == ("images in Parquet files", 3)
        assert _left_out(source) == {".md files": (1, "README.md"), ".png files": (1, "logo.png")}
    with pytest.raises(DataError, match="has no column 'picture'"):
        open_any(tmp_path, image_column="picture")


def _write_runs(output: Path) -> None:
    """What two runs and a comparison leave in `run.output`, of what could be taken for data."""
    for run in ("one", "deep/two"):
        (output / run).mkdir(parents=True)
        (output / run / "config.json").write_text('{"config": {}, "run_identity": "0"}')
        _write(output / run, "figures/views.png", "knn_pending/1.png")
        write_parquet(output / run / "selection" / "part-0.parquet", [IMAGE], row_group_size=1)
    (output / "compared").mkdir()
    (output / "compared" / "comparison.json").write_text('{"settings": {}, "costs": {}}')
    _write(output, "compared/figures/arms.png", "mlflow-artifacts/0a/artifacts/figures/views.png", "mlflow.db")


@pytest.mark.parametrize("output", ["runs", "."])
@pytest.mark.parametrize("kind", ["folder", "parquet", "uri"])
def test_folders_of_runs_are_never_data(tmp_path: Path, output: str, kind: str) -> None:
    """The second run, and a resume of the first, find the images that the first one found."""
    location = tmp_path.as_uri() if kind == "uri" else str(tmp_path)
    if kind == "folder":
        _write(tmp_path, "a/1.png", "b/2.png")
        (tmp_path / "a" / "config.json").write_text('{"name": "of somebody else"}')
    else:
        write_parquet(tmp_path / "a.parquet", [IMAGE] * 3, row_group_size=2)
    before = open_any(location)
    _write_runs(tmp_path / output)
    after = open_any(location)
    assert after.num_samples == before.num_samples
    assert after.fingerprint() == before.fingerprint()
    assert _left_out(after)["entries that hvp_ray wrote"][0] >= 2


def test_of_two_links_to_a_folder_the_same_one_counts_whatever_the_order_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "outside", "1.png", "2.png")
    for name in ("b", "c", "d"):
        (tmp_path / "root").mkdir(exist_ok=True)
        (tmp_path / "root" / name).symlink_to(tmp_path / "outside")
    expected = _paths(open_any(tmp_path / "root"), tmp_path / "root")
    assert expected == ["b/1.png", "b/2.png"]
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reversed(list(scandir(path))))
    assert _paths(open_any(tmp_path / "root"), tmp_path / "root") == expected
