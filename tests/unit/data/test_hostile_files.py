"""Files that would hang a run, fill its memory or crash it are refused quickly, in bounded memory, with a reason.

The bombs go off in child processes, whose peak memory is measured and limited, so that a failure kills no machine. What
"quickly" means depends on the machine: time is counted in units of a fixed piece of work, measured beside each file.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hvp_ray.config import DataConfig
from hvp_ray.data.decode import decode_rgb, read_size
from hvp_ray.data.folder import FolderSource
from hvp_ray.data.source import open_source
from hvp_ray.errors import DataError, UnreadableImageError
from hvp_ray.stream.reading import read_images
from tests.helpers import encode, photograph_like
from tests.unit.data import bombs

ROOT = Path(__file__).parents[3]
MAX_PIXELS = DataConfig(source="x").max_image_pixels
MAX_WORK = 5.0  # three million additions, each; about a second on a machine of 2024
MAX_GROWTH_MIB = 100.0

_CHILD = """
import contextlib, json, resource, sys, time
from pathlib import Path
from hvp_ray.errors import HvpRayError

def memory_mib(name):
    # Not getrusage: its peak counts the parent process in.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))

def seconds_of_a_tenth_unit():
    start, total = time.process_time(), 0
    for i in range(300_000):
        total += i
    return time.process_time() - start

def outcome(work, *arguments):
    tenth = seconds_of_a_tenth_unit()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory_mib("VmHWM"), time.process_time()
    try:
        result = work(*arguments)
    except HvpRayError as error:
        result = f"{type(error).__name__}: {error}"
    except Exception as error:
        result = f"not ours: {type(error).__name__}: {error}"
    seconds, growth_mib = time.process_time() - start, memory_mib("VmHWM") - before
    units = seconds / (10 * max(tenth, seconds_of_a_tenth_unit()))
    return {"result": result, "work": units, "growth_mib": growth_mib}

resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
"""

_DECODE = (
    _CHILD
    + """
from hvp_ray.data.decode import decode_rgb, read_size
def size(image): return list(read_size(image, max_pixels=int(sys.argv[2])))
def decode(image): return list(decode_rgb(image, max_pixels=int(sys.argv[2])).shape[:2])
for path in sorted(Path(sys.argv[1]).iterdir()):
    image = path.read_bytes()
    print(json.dumps({"name": path.name, "size": outcome(size, image), "decode": outcome(decode, image)}), flush=True)
"""
)

_READ = (
    _CHILD
    + """
from hvp_ray.config import DataConfig
from hvp_ray.data.source import open_source
def read(path):
    source = open_source(path, DataConfig(source=path, **json.loads(sys.argv[1])))
    if source.has_labels:
        source.load_labels()
    for block in source.block_starts.tolist():
        source.read([block])
    return source.num_samples
warm = outcome(read, sys.argv[2])  # what Arrow takes for itself
for path in sys.argv[3:]:
    print(json.dumps({"name": Path(path).name} | outcome(read, path)), flush=True)
"""
)


def _run_child(code: str, *arguments: object) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    return {record["name"]: record for record in map(json.loads, child.stdout.splitlines())}


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Decode every image in one process; return the outcomes."""
    folder = tmp_path_factory.mktemp("images")
    for name, (make, _) in [*bombs.IMAGES.items(), *bombs.HARMLESS.items()]:
        (folder / _file_name(name)).write_bytes(make())
    return _run_child(_DECODE, folder, MAX_PIXELS)


@pytest.mark.parametrize("name", list(bombs.IMAGES))
def test_image_bomb_is_unreadable_at_once_and_takes_no_memory(decoded: dict[str, dict[str, Any]], name: str) -> None:
    found = decoded[_file_name(name)]
    assert re.search(bombs.IMAGES[name][1], found["decode"]["result"]), found
    assert found["decode"]["result"].startswith("UnreadableImageError: ")
    for step in ("size", "decode"):
        assert found[step]["work"] < MAX_WORK
        assert found[step]["growth_mib"] < MAX_GROWTH_MIB


@pytest.mark.parametrize("name", list(bombs.HARMLESS))
def test_what_looks_like_a_bomb_and_is_none_is_read(decoded: dict[str, dict[str, Any]], name: str) -> None:
    found = decoded[_file_name(name)]
    assert found["size"]["result"] == found["decode"]["result"] == list(bombs.HARMLESS[name][1])
    assert found["decode"]["work"] < MAX_WORK
    assert found["decode"]["growth_mib"] < MAX_GROWTH_MIB


def test_size_is_read_without_decoding_and_a_large_image_is_not_held_in_many_copies(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bombs.png(4_000, 6_000))
    found = _run_child(_DECODE, tmp_path, MAX_PIXELS)["a"]
    assert found["size"]["growth_mib"] < 10
    assert found["decode"]["growth_mib"] < 9 * 4_000 * 6_000 / 2**20


def test_progressive_jpeg_with_a_film_behind_it_is_read(generator: np.random.Generator) -> None:
    image = encode(photograph_like(generator, 90, 120), "JPEG", progressive=True)
    film = b"\xff\xda" * 5_000 + generator.bytes(10_000)
    assert np.array_equal(decode_rgb(image + film, max_pixels=MAX_PIXELS), decode_rgb(image, max_pixels=MAX_PIXELS))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA"])
def test_damaged_bytes_of_every_format_raise_one_type_of_error(generator: np.random.Generator, kind: str) -> None:
    image = encode(photograph_like(generator, 40, 50), kind)
    assert read_size(image, max_pixels=MAX_PIXELS) == (40, 50)
    for _ in range(40):
        damaged = bytearray(image[: int(generator.integers(1, len(image) + 1))])
        for place in generator.integers(0, min(len(damaged), 400), 6).tolist():
            damaged[place] = int(generator.integers(256))
        try:
            decode_rgb(bytes(damaged), max_pixels=10**6)
        except UnreadableImageError:
            pass


LIMITS = {"max_row_group_mib": 16, "max_image_mib": 1}
MAX_LYING_MIB = 2 * LIMITS["max_row_group_mib"] + 2 * 1_024 + 100
"""Twice the limit and 1 GiB, and the memory that Arrow's allocator has reserved before."""
LARGE = "MiB or more of column '.*', but data.max_row_group_mib=16"


class _Bombs:
    """Writes files into a folder, and collects the expected message of each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._few = bombs.images_table([bombs.picture()] * 10)
        self.said: dict[str, str] = {}

    def path(self, name: str, message: str) -> Path:
        self.said[name] = message
        return self._folder / name

    def write(self, name: str, message: str, table: pa.Table | None = None, **options: Any) -> Path:
        return bombs.write_parquet(self.path(name, message), self._few if table is None else table, **options)

    def footer(self, name: str, message: str, table: pa.Table | None = None, **options: Any) -> bombs.Footer:
        return bombs.Footer(self.write(name, message, table, **options))

    def add_honest(self) -> None:
        self.write("zeros.parquet", f"has 180 {LARGE}", bombs.images_table([bytes(60 * 2**20)] * 3))
        bombs.write_dictionary_bomb(self.path("dictionary.parquet", LARGE), value_bytes=2**20, num_rows=500)
        message = "5000000 rows in .* bytes cannot be images"
        bombs.write_labels_bomb(self.path("labels.parquet", message), 5_000_000)
        classes = self._few.set_column(1, "label", pa.array([10**15] * 10))
        self.write("classes.parquet", "values from 1000000000000000 to .*--data.label_column", classes)

    def add_lying_footers(self) -> None:
        for name, column, number, value, message in (
            ("values.parquet", 0, bombs.CHUNK_VALUES, 10**9, "10 rows, but 1000000000 values"),
            ("label-values.parquet", 2, bombs.CHUNK_VALUES, 10**9, "10 rows, but 1000000000 values"),
            ("beyond.parquet", 0, bombs.CHUNK_COMPRESSED, 10**9, "is damaged: row group 0 has bytes 4 to"),
            ("start.parquet", 0, bombs.CHUNK_START, 10**9, "is damaged: row group 0 has bytes 1000000000 to"),
            ("minus.parquet", 0, bombs.CHUNK_DECOMPRESSED, -5, "-5 decompressed"),
        ):
            footer = self.footer(name, message)
            bombs.field(footer.chunk(column), number)[2] = value
            footer.write()
        for name, in_group, in_file, message in (
            ("rows.parquet", 10**9, 10**9, "1000000000 rows, but 10 values"),
            ("group-rows.parquet", 10**9, 10, "the footer has 10 rows, its row groups 1000000000"),
            ("negative-rows.parquet", -10, -10, "the footer has -10 rows"),
        ):
            footer = self.footer(name, message)
            bombs.field(footer.row_group(), bombs.GROUP_ROWS)[2] = in_group
            bombs.field(footer.fields, bombs.FILE_ROWS)[2] = in_file
            footer.write()
        refusal = "cannot be read as Parquet"
        bombs.write_footer(self.path("entries.parquet", f"{refusal}.*size limit"), bombs.footer_of_chunks(700_000))
        bombs.write_footer(self.path("columns.parquet", f"{refusal}.*50000 of 1"), bombs.footer_of_chunks(50_000))
        end = (2**29).to_bytes(4, "little") + b"PAR1"
        bombs.sparse(self.path("footer.parquet", "has a footer of 512 MiB"), 2**30, end=end)
        footer = self.footer("schema.parquet", refusal)
        for entry in bombs.field(footer.fields, 5)[2][1]:
            if bombs.field(entry, 1)[2] == b"ARROW:schema":
                bombs.field(entry, 2)[2] = b"/////" + b"x" * 10**6
        footer.write()
        # pyarrow ends the process that looks at this column.
        footer = self.footer("levels.parquet", "crashes the process that reads it .SIGABRT: .*histogram")
        bombs.field(bombs.field(footer.chunk(0), bombs.CHUNK_STATISTICS_OF_SIZE)[2], 3)[2][1].append(7)
        footer.write()

    def add_lying_pages(self) -> None:
        footer = self.footer("modest.parquet", f"has 180 {LARGE}", bombs.images_table([bytes(60 * 2**20)] * 3))
        bombs.field(footer.chunk(0), bombs.CHUNK_DECOMPRESSED)[2] = 1_000  # the pages hold more
        footer.write()
        bombs.write_page_bomb(self.path("pages.parquet", f"has 32 {LARGE}"), page_bytes=60 * 2**20, num_pages=80)
        few = pa.table({"image": self._few["image"].combine_chunks().field("bytes")})
        for name, number, value, message in (
            ("page.parquet", 2, 2**31 - 1, f"has 32 {LARGE}"),
            ("page-values.parquet", 5, 2**31 - 1, "row group 0 is damaged"),
            ("page-minus.parquet", 3, -1_000, "row group 0 is damaged"),
        ):
            footer = self.footer(name, message, few, write_statistics=False)
            start = bombs.field(footer.chunk(0), bombs.CHUNK_START)[2]
            page = bombs.ThriftIn(footer.data[start:])
            header = page.struct()
            of_values = bombs.field(header, 5)[2]
            bombs.field(of_values if number == 5 else header, 1 if number == 5 else number)[2] = value
            changed = bombs.thrift_struct(header)
            bombs.field(footer.chunk(0), bombs.CHUNK_COMPRESSED)[2] += len(changed) - page.position
            footer.data = footer.data[:start] + changed + footer.data[start + page.position :]
            footer.write()

    def add_cut(self) -> None:
        whole = bombs.write_parquet(self._folder / "whole", self._few).read_bytes()
        for kept in (0, 3, 8, len(whole) // 2, len(whole) - 9, len(whole) - 1):
            self.path(f"cut-{kept}.parquet", "cannot be read as Parquet").write_bytes(whole[:kept])


def test_parquet_bombs_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    made = _Bombs(tmp_path)
    made.add_honest()
    honest = set(made.said)
    made.add_lying_footers()
    made.add_lying_pages()
    made.add_cut()
    good = bombs.write_parquet(tmp_path / "good.parquet", bombs.images_table([bombs.picture()] * 10))
    found = _run_child(_READ, json.dumps(LIMITS), good, *[tmp_path / name for name in made.said])
    assert found.keys() == made.said.keys()
    for name, message in made.said.items():
        assert found[name]["result"].startswith(("DataError: ", "LabelError: ")), found[name]
        assert re.search(message, found[name]["result"]), found[name]
        assert str(tmp_path / name) in found[name]["result"]
        assert found[name]["work"] < 5 * MAX_WORK, found[name]
        limit_mib = 3 * LIMITS["max_row_group_mib"] + 40 if name in honest else MAX_LYING_MIB
        assert found[name]["growth_mib"] < limit_mib, found[name]


def test_files_below_the_limits_are_read(tmp_path: Path) -> None:
    good = bombs.write_parquet(tmp_path / "a.parquet", bombs.images_table([bombs.picture()] * 10))
    paths = bombs.images_table([bombs.picture()] * 3, paths=["x" * 60 * 2**20] * 3)  # paths are not read
    files = {
        "paths.parquet": bombs.write_parquet(tmp_path / "paths.parquet", paths),
        "repeated.parquet": bombs.write_dictionary_bomb(tmp_path / "repeated.parquet", value_bytes=9_000, num_rows=99),
        "nothing.parquet": bombs.write_labels_bomb(tmp_path / "nothing.parquet", 1_000_000),
    }
    found = _run_child(_READ, json.dumps(LIMITS), good, *files.values())
    assert [found[name]["result"] for name in files] == [3, 99, 1_000_000]
    assert all(found[name]["growth_mib"] < 60 for name in files)  # nothing.parquet: 44 bytes for each of its rows


def test_long_texts_that_are_repeated_as_labels_take_little_memory(tmp_path: Path) -> None:
    good = bombs.write_parquet(tmp_path / "a.parquet", bombs.images_table([bombs.picture()] * 10))
    count = 20_000  # of 100 kB: 2 GB, if all were there at once
    categories = pa.DictionaryArray.from_arrays(
        pa.array(np.arange(count) % 2, pa.int32()), pa.array(["x" * 100_000, "y" * 100_000])
    )
    table = pa.table({"image": pa.nulls(count, pa.binary()), "label": categories})
    files = [  # without Arrow's schema, categories are texts
        bombs.write_parquet(tmp_path / name, table, use_dictionary=True, store_schema=name == "categories.parquet")
        for name in ("categories.parquet", "texts.parquet")
    ]
    found = _run_child(_READ, json.dumps(LIMITS), good, *files)
    for record in found.values():
        assert record["result"] == count
        assert record["growth_mib"] < 3 * LIMITS["max_row_group_mib"] + 40, record


@pytest.mark.parametrize("use_dictionary", [False, True])
def test_row_group_read_in_parts_gives_the_same_images(
    tmp_path: Path, generator: np.random.Generator, use_dictionary: bool
) -> None:
    images: list[bytes | None] = [generator.bytes(int(size)) for size in generator.integers(1, 3_000, 700)]
    images[5] = images[699] = None
    images += images[:50] * 8
    path = bombs.write_parquet(
        tmp_path / "a.parquet",
        bombs.images_table(images),  # type: ignore[arg-type]
        use_dictionary=use_dictionary,
        dictionary_pagesize_limit=400_000,
        data_page_size=50_000,
    )
    source = open_source(str(path), DataConfig(source=str(path), max_row_group_mib=2))
    wanted = [image or b"" for image in images]
    assert source.read(range(len(images))) == wanted
    order = generator.permutation(len(images)).tolist()
    assert source.read(order) == [wanted[row] for row in order]


def test_fuzzed_parquet_gives_images_or_a_sentence(tmp_path: Path, generator: np.random.Generator) -> None:
    table = bombs.images_table([bombs.picture() + bytes([i]) for i in range(60)])
    whole = bombs.write_parquet(tmp_path / "a.parquet", table, use_dictionary=True, row_group_size=20).read_bytes()
    paths = []
    for number in range(40):
        content = bytearray(whole)
        for _ in range(3):
            content[int(generator.integers(0, len(content) - 8))] = int(generator.integers(256))
        paths.append(tmp_path / f"{number}.parquet")
        paths[-1].write_bytes(content)
    found = _run_child(_READ, json.dumps(LIMITS), tmp_path / "a.parquet", *paths)
    results = [record["result"] for record in found.values()]
    assert len(results) == 40
    assert not [
        result
        for result in results
        if isinstance(result, str) and not result.startswith(("DataError: ", "LabelError: "))
    ]
    assert max(record["growth_mib"] for record in found.values()) < 60


def test_large_images_count_as_unreadable(tmp_path: Path) -> None:
    path = bombs.write_parquet(tmp_path / "a.parquet", bombs.images_table([bombs.picture(), bytes(2**20 + 1)]))
    source = open_source(str(path), DataConfig(source=str(path), max_image_mib=1))
    assert source.read([0, 1]) == [bombs.picture(), b""]
    with pytest.raises(UnreadableImageError, match="data.max_image_mib"):
        read_size(b"", max_pixels=9)


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Interrupt a test that waits longer than ten seconds."""

    def interrupt(_number: int, _frame: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_hang")
def test_pipes_devices_and_broken_links_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    for path in (root / "a/1.png", outside / "2.png", outside / "deep/3.png"):
        path.write_bytes(bombs.picture())
    os.mkfifo(root / "a/pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(root)  # a socket's path is short
        server.bind("socket.png")
    (root / "a/zero.png").symlink_to("/dev/zero")
    (root / "a/gone.png").symlink_to(tmp_path / "gone")
    (root / "a/itself.png").symlink_to(root / "a/itself.png")
    (root / "a/file.png").symlink_to(outside / "2.png")
    (root / "b").symlink_to(outside / "deep")
    (root / "a/loop").symlink_to(root / "a")
    (root / "a/root").symlink_to(root)
    (root / "a/up").symlink_to(tmp_path)
    (root / "a/everything").symlink_to("/")
    source = open_source(str(root), DataConfig(source=str(root)))
    found = [Path(source.describe(index)).relative_to(root).as_posix() for index in range(source.num_samples)]
    assert found == ["a/1.png", "a/file.png", "b/3.png"]
    assert source.read([0, 1, 2]) == [bombs.picture()] * 3
    assert "7 entries" in caplog.text
    assert "are no files (broken links, loops, pipes, devices)" in caplog.text


@pytest.mark.usefixtures("no_hang")
def test_file_that_became_a_pipe_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(bombs.picture())
    source = open_source(str(tmp_path), DataConfig(source=str(tmp_path)))
    (tmp_path / "1.png").unlink()
    os.mkfifo(tmp_path / "1.png")
    assert source.read([0]) == [b""]
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").symlink_to("/dev/zero")
    assert source.read([0]) == [b""]


def test_huge_files_are_named_and_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bombs.sparse(tmp_path / "1.png", 2**40)
    (tmp_path / "2.png").write_bytes(bombs.picture())
    source = open_source(str(tmp_path), DataConfig(source=str(tmp_path)))
    assert source.read([0, 1]) == [b"", bombs.picture()]
    assert "1 images of" in caplog.text
    assert "more than data.max_image_mib=64 MiB and count as unreadable, the first: 1.png" in caplog.text


def test_file_without_permission_stops_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(bombs.picture())
    source = FolderSource(tmp_path, max_image_bytes=2**20)
    (tmp_path / "1.png").chmod(0)
    if os.access(tmp_path / "1.png", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataError, match=r"failed 4 times.*1\.png"):
        read_images(source, [0])


@pytest.mark.usefixtures("no_hang")
def test_sources_that_are_no_folders_and_no_files_say_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {"pipe": "is a pipe, a device", "pipe.parquet": "is a pipe, a device", "loop": "does not exist"}
    for name in ("images.zip", "images.tar.gz", "IMAGES.TGZ", "images.tar"):
        (tmp_path / name).write_bytes(b"x")
        cases[name] = "is a compressed archive, and those are not read; unpack it"
    cases["images.tar"] = "images.tar is damaged or not complete: .*; copy it or write it again"
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / name), DataConfig(source=str(tmp_path / name)))
    for name in ("/dev/zero", "x" * 5_000):
        with pytest.raises(DataError, match="data.source="):
            open_source(name, DataConfig(source=name))
