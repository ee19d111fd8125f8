"""Labelled images in every format of a source, for the tests of this folder."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hvp_ray.config import DataConfig
from hvp_ray.data.packing import PackResult
from hvp_ray.data.packing_pool import pack
from hvp_ray.data.source import Source, open_source
from tests.helpers import encode, photograph_like

PARQUET_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def open_any(source: object, **options: object) -> Source:
    return open_source(str(source), DataConfig(source=str(source), **options))


def draw_images(count: int, generator: np.random.Generator) -> list[bytes]:
    """JPEGs and PNGs of several sizes, no two alike."""
    sizes = generator.integers(8, 40, (count, 2)).tolist()
    return [
        encode(photograph_like(generator, height, width), "JPEG" if index % 2 else "PNG")
        for index, (height, width) in enumerate(sizes)
    ]


def write_folder(root: Path, images: list[bytes], num_classes: int = 3) -> Path:
    """Sorted names are in the order of the list, so ids are its indices."""
    for index, image in enumerate(images):
        label = index * num_classes // len(images)
        path = root / f"class-{label}" / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return root


def write_parquet(
    path: Path, images: list[bytes], *, row_group_size: int, first: int = 0, num_classes: int = 3, total: int = 0
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": image, "path": f"{first + index:05d}.png"} for index, image in enumerate(images)]
    labels = [(first + index) * num_classes // (total or len(images)) for index in range(len(images))]
    table = pa.table({"image": pa.array(rows, PARQUET_TYPE), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def pack_here(source: object, target: object, **options: object) -> PackResult:
    """Pack with one process unless told otherwise."""
    settings = {"shard_mib": 1, "num_workers": 1, "is_strict": False} | options
    config = DataConfig(source=str(source), **settings.pop("config", {}))  # type: ignore[arg-type]
    return pack(str(source), str(target), config, **settings)  # type: ignore[arg-type]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def upload(folder: Path, uri: str) -> None:
    """Copy a folder to a bucket."""
    filesystem, root = pafs.FileSystem.from_uri(uri)
    for name, content in content_of(folder).items():
        with filesystem.open_output_stream(f"{root}/{name}") as stream:
            stream.write(content)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_saved(folder: Path, table: pa.Table, *, num_files: int = 1) -> Path:
    """What `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{index:05d}-of-{num_files:05d}.arrow" for index in range(num_files)]
    bounds = np.linspace(0, len(table), num_files + 1).astype(int)
    for name, start, end in zip(names, bounds[:-1], bounds[1:], strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table[start:end], max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder
