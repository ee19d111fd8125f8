"""What reading costs: bytes read for bytes used, memory of an index, the order of an epoch, packing.

python benchmarks/data.py [bytes] [index] [order] [pack] [--images N] [--mib N] [--json FILE]

bytes: a whole epoch of made-up images (--mib; more than data.block_cache_mib for a number that means something) with the
default settings and 1, 2 and 4 view workers, which are processes of their own, on Parquet and on packed shards. index: memory
that opening --images images takes in a process of its own. order: time and memory until the first batch of an epoch is known,
for 1.28, 10 and 100 million images (at most 100 times --images). pack: images/s of pipelines/pack.py. Files lie below TMPDIR
and are deleted.
"""

import argparse
import json
import multiprocessing
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hvp_ray.config import DataConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.data.order import SampleOrder
from hvp_ray.data.packing_pool import pack
from hvp_ray.data.source import open_source

PARTS = ("bytes", "index", "order", "pack")
IMAGES_PER_STEP = 256
ROW_GROUP = 100  # rows; what Hugging Face's `datasets` writes for images
IMAGE_BYTES = 110_000  # ImageNet's mean
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MIB = 2**20


def memory_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def in_a_process(work: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def write_parquet(folder: Path, images: Iterator[bytes], per_file: int) -> Path:
    folder.mkdir()
    kind = pa.schema([("image", IMAGE_TYPE), ("label", pa.int64())])
    number, writer, rows = 0, None, []
    for index, image in enumerate(images):
        rows.append({"image": {"bytes": image, "path": f"{index}.jpg"}, "label": index % 1000})
        if len(rows) == ROW_GROUP:
            writer = writer or pq.ParquetWriter(folder / f"train-{number:05d}.parquet", kind)
            writer.write_table(pa.Table.from_pylist(rows, kind), row_group_size=ROW_GROUP)
            rows = []
            if (index + 1) % per_file == 0:
                writer.close()
                number, writer = number + 1, None
    if writer is not None:
        writer.close()
    return folder


def a_photograph() -> bytes:
    """A JPEG of 16 px, to be followed by noise until it weighs what a photograph does."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def made_up_images(count: int) -> Iterator[bytes]:
    generator, jpeg = np.random.default_rng(1), a_photograph()
    noise = generator.bytes(64 * MIB)
    for size in generator.gamma(4.0, IMAGE_BYTES / 4.0, count).astype(int).tolist():
        start = int(generator.integers(0, len(noise) // 2))
        yield jpeg + noise[start : start + size]


def read_epoch(source: str, worker: int, num_workers: int) -> tuple[int, int, float, float]:
    """Read the steps of one view worker; return bytes read, bytes used, seconds, MiB of memory at the peak."""
    config = DataConfig(source=source, test_fraction=0.0)
    dataset = open_dataset(config)
    order = order_of(dataset, config)
    used, start = 0, time.perf_counter()
    for step in range(worker, order.steps_per_epoch, num_workers):
        used += sum(map(len, dataset.source.read(order.sample_ids_of_step(step).tolist())))
    read: int = dataset.source.num_bytes_read  # type: ignore[attr-defined]
    return read, used, time.perf_counter() - start, memory_mib("VmHWM")


def order_of(dataset: Any, config: DataConfig) -> SampleOrder:
    return SampleOrder(
        seed=0,
        sample_ids=dataset.training_ids,
        images_per_step=IMAGES_PER_STEP,
        block_starts=dataset.source.block_starts,
        window_images=dataset.shuffle_window_images(config),
    )


def bench_bytes(report: Callable[..., None], mib: int, folder: Path) -> None:
    count = max(20 * IMAGES_PER_STEP, mib * MIB // IMAGE_BYTES) // ROW_GROUP * ROW_GROUP
    sources = {"parquet": write_parquet(folder / "parquet", made_up_images(count), 5_000)}
    sources["shards"] = folder / "shards"
    config = DataConfig(source=str(sources["parquet"]))
    pack(config.source, str(sources["shards"]), config, shard_mib=128, num_workers=2, is_strict=True)
    for name, source in sources.items():
        for num_workers in (1, 2, 4):
            with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
                parts = pool.starmap(
                    read_epoch, [(str(source), w, num_workers) for w in range(num_workers)], chunksize=1
                )
            read, used, seconds, peak = (list(column) for column in zip(*parts, strict=True))
            context = {"view_workers": num_workers, "images": count, "used_mib": sum(used) // MIB}
            report(f"data.{name}.bytes_ratio", sum(read) / sum(used), "read/used", **context)
            report(f"data.{name}.read_mib_per_second", sum(used) / MIB / max(seconds), "MiB/s", **context)
            report(f"data.{name}.worker_peak_memory", max(peak), "MiB", **context)


def open_and_weigh(source: str, small: str) -> tuple[float, float, float]:
    """Return MiB after opening, MiB at the peak of it (both above what the libraries take), and CPU seconds."""
    config = DataConfig(source=source, test_fraction=0.0)
    open_source(small, config)
    before, start = memory_mib("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    opened = open_source(source, config)
    seconds = time.process_time() - start
    now, peak = memory_mib("VmRSS") - before, memory_mib("VmHWM") - before
    assert opened.num_samples
    return now, peak, seconds


def write_all_kinds(folder: Path, count: int) -> None:
    jpeg = a_photograph()
    for index in range(count):
        place = folder / "folder" / f"class-{index % 1000:04d}"
        if index < 1000:
            place.mkdir(parents=True)
        (place / f"image-{index:012d}.jpg").touch()
    write_parquet(folder / "parquet", (jpeg for _ in range(count)), 5_000)
    config = DataConfig(source=str(folder / "parquet"))
    pack(config.source, str(folder / "shards"), config, shard_mib=8, num_workers=2, is_strict=True)


def bench_index(report: Callable[..., None], count: int, folder: Path) -> None:
    write_all_kinds(folder / "many", count)
    write_all_kinds(folder / "few", 1_000)
    for name in ("folder", "parquet", "shards"):
        now, peak, seconds = in_a_process(open_and_weigh, str(folder / "many" / name), str(folder / "few" / name))
        millions = count / 1e6
        report(f"data.{name}.index_mib_per_million", now / millions, "MiB", images=count)
        report(f"data.{name}.opening_peak_mib_per_million", peak / millions, "MiB", images=count)
        report(f"data.{name}.opening_cpu_seconds_per_million", seconds / millions, "s", images=count)


def first_batch(count: int, block_rows: int | None) -> tuple[float, float, float]:
    """Return CPU seconds to the first batch, seconds to one in the middle, and MiB at the peak, without the ids."""
    ids = np.arange(count, dtype=np.int64)
    starts = None if block_rows is None else np.arange(0, count, block_rows, dtype=np.int64)
    order = SampleOrder(seed=0, sample_ids=ids, images_per_step=IMAGES_PER_STEP, block_starts=starts)
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    order.sample_ids_of_step(0)
    first = time.process_time() - start
    start = time.process_time()
    order.sample_ids_of_step(order.steps_per_epoch // 2)
    return first, time.process_time() - start, memory_mib("VmHWM") - before


def bench_order(report: Callable[..., None], largest: int) -> None:
    for count in (n for n in (1_281_167, 10_000_000, 100_000_000) if n <= largest):
        for name, rows in (("global", None), ("blocks", ROW_GROUP)):
            first, middle, peak = in_a_process(first_batch, count, rows)
            report(f"data.order.{name}.first_batch_cpu_seconds", first, "s", images=count)
            report(f"data.order.{name}.later_window_cpu_seconds", middle, "s", images=count)
            report(f"data.order.{name}.peak_memory", peak, "MiB", images=count)


def bench_pack(report: Callable[..., None], folder: Path) -> None:
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (47, 63, 3), np.uint8)  # enlarged, so that it weighs what photographs do
    buffer = io.BytesIO()
    Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    count = 4_000
    source = write_parquet(folder / "parquet", (buffer.getvalue() for _ in range(count)), 1_000)
    for num_workers in (1, 2):
        start = time.perf_counter()
        config = DataConfig(source=str(source))
        target = folder / f"shards-{num_workers}"
        pack(config.source, str(target), config, shard_mib=8, num_workers=num_workers, is_strict=True)
        report(
            "data.pack.images_per_second", count / (time.perf_counter() - start), "images/s",
            workers=num_workers, image_bytes=len(buffer.getvalue()), pixels="500x375",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--images", type=int, default=1_000_000, help="of the index (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=6_144, help="of images that are read (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a line")
    options = parser.parse_args()
    if wrong := set(options.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(wrong))}; choose from {', '.join(PARTS)}")
    lines: list[str] = []

    def report(name: str, value: float, unit: str, **context: Any) -> None:
        print(f"{name:<44} {value:>12.4g} {unit:<10} {', '.join(f'{k} {v}' for k, v in context.items())}", flush=True)
        versions = {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__}
        lines.append(json.dumps({"name": name, "value": value, "unit": unit, **context, **versions}))

    for part in options.parts or PARTS:
        folder = Path(tempfile.mkdtemp(prefix="hvp_ray-bench-"))
        try:
            match part:
                case "bytes":
                    bench_bytes(report, options.mib, folder)
                case "index":
                    bench_index(report, options.images, folder)
                case "order":
                    bench_order(report, 100 * options.images)
                case "pack":
                    bench_pack(report, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json is not None:
        options.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
