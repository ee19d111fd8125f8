"""Every format of a source gives the same images, labels, order, views and replacements, to the bit."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvp_ray.config import DataConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.data.order import SampleOrder
from hvp_ray.data.source import Source
from hvp_ray.records import BatchRequest, Replacement, ViewBatch
from hvp_ray.stream.render_batch import RenderContext, render_batch
from hvp_ray.views.render_cpu import CpuRenderer
from tests.helpers import views_config
from tests.unit.data.made import PARQUET_TYPE, draw_images, open_any, write_saved, write_tar

NUM_IMAGES = 300
DAMAGED = (17, 101, 250)
NAMES = ("ant", "bee", "cat")
LABELS = [index * 3 // NUM_IMAGES for index in range(NUM_IMAGES)]
KINDS = (
    "folder",
    "WebDataset",
    "WebDataset in files",
    "Hugging Face",
    "Parquet",
    "nested Parquet",
    "CSV",
    "Parquet list",
)


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    images = draw_images(NUM_IMAGES, np.random.default_rng(7))
    for index in DAMAGED:
        images[index] = images[index][: len(images[index]) // 2]
    return images


@pytest.fixture(scope="module")
def written(images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Location of the images in each format."""
    root = tmp_path_factory.mktemp("formats")
    names = [NAMES[label] for label in LABELS]
    paths = [f"folder/{name}/{index:05d}.png" for index, name in enumerate(names)]
    for path, image in zip(paths, images, strict=True):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(image)
    members = []
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        members += [(f"{index:05d}.png", image), (f"{index:05d}.cls", name.encode())]
    for part in range(3):
        write_tar(root / "shards" / f"{part}.tar", members[200 * part : 200 * (part + 1)])
    rows = pa.array([{"bytes": image, "path": path} for image, path in zip(images, paths, strict=True)], PARQUET_TYPE)
    label = '{"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}'
    saved = pa.table({"picture": rows, "animal": LABELS}).replace_schema_metadata(
        {"huggingface": f'{{"info": {{"features": {{"animal": {label}}}}}}}'}
    )
    nested = pa.StructArray.from_arrays([pa.array(images), pa.array(names)], ["jpg", "class_name"])
    pq.write_table(pa.table({"img": rows, "category": names}), root / "flat.parquet")
    pq.write_table(pa.table({"sample": nested}), root / "nested.parquet")
    pq.write_table(pa.table({"file_name": paths, "target": names}), root / "list.parquet")
    lines = [f"{path},{name}" for path, name in zip(paths, names, strict=True)]
    (root / "list.csv").write_text("\n".join(["filename,class", *lines]))
    return {
        "folder": root / "folder",
        "WebDataset": write_tar(root / "all.tar", members),
        "WebDataset in files": root / "shards",
        "Hugging Face": write_saved(root / "saved", saved, num_files=4),
        "Parquet": root / "flat.parquet",
        "nested Parquet": root / "nested.parquet",
        "CSV": root / "list.csv",
        "Parquet list": root / "list.parquet",
    }


def _batches(location: Path) -> tuple[Source, list[ViewBatch]]:
    config = DataConfig(source=str(location))
    dataset = open_dataset(config)
    views = views_config(16)
    context = RenderContext(
        seed=3,
        source=dataset.source,
        training_ids=dataset.training_ids,
        data=config,
        views=views,
        renderer=CpuRenderer(views, config),
    )
    order = SampleOrder(
        seed=3,
        sample_ids=dataset.training_ids,
        images_per_step=24,
        block_starts=dataset.source.block_starts,
        window_images=dataset.shuffle_window_images(config),
    )
    requests = [
        BatchRequest(
            step=step, epoch=0, first_position=24 * step, sample_ids=order.sample_ids_of_step(step), num_views=2
        )
        for step in range(order.steps_per_epoch)
    ]
    return dataset.source, [render_batch(context, request) for request in requests]


def _replaced(entry: Replacement) -> tuple[int, int, int]:
    return entry.index, entry.unreadable_id, entry.replacement_id


@pytest.fixture(scope="module")
def of_folder(written: dict[str, Path]) -> tuple[Source, list[ViewBatch]]:
    return _batches(written["folder"])


@pytest.mark.parametrize("kind", KINDS)
def test_formats_give_equal_images_labels_order_views_and_replacements(
    written: dict[str, Path], of_folder: tuple[Source, list[ViewBatch]], images: list[bytes], kind: str
) -> None:
    source, batches = _batches(written[kind])
    assert source.read(range(NUM_IMAGES)) == images
    assert source.load_labels().tolist() == LABELS
    assert source.load_class_names() == NAMES
    for one, other in zip(batches, of_folder[1], strict=True):
        assert np.array_equal(one.sample_ids, other.sample_ids)
        assert np.array_equal(one.global_views.pixels, other.global_views.pixels)
        assert [_replaced(entry) for entry in one.replacements] == [_replaced(entry) for entry in other.replacements]
    replaced = [entry.unreadable_id for batch in batches for entry in batch.replacements]
    assert set(replaced) <= set(DAMAGED) and replaced


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_is_that_of_the_images_wherever_they_lie(
    written: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    source = open_any(written[kind])
    link = tmp_path / written[kind].name
    link.symlink_to(written[kind])
    if kind not in ("CSV", "Parquet list"):  # their paths are relative
        assert open_any(link).fingerprint() == source.fingerprint()
        assert open_any(link).shares_files_with(source)
    assert source.shares_files_with(open_any(written[kind]))
    assert not source.shares_files_with(open_any("digits"))
