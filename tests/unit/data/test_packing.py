"""Packing gives the same bytes for any number of processes and kills. Unreadable images are left out, listed and counted."""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvp_ray.config import DataConfig
from hvp_ray.data.packing import Target, commit, open_for_packing, pack_task, plan_packing, verify_shards
from hvp_ray.errors import ConfigError, DataError
from tests.helpers import encode
from tests.unit.data import made_intensities
from tests.unit.data.made import content_of, draw_images, open_any, pack_here, write_folder, write_parquet

ROOT = Path(__file__).parents[3]
NUM_IMAGES = 1_200


def _nothing(_done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    generator = np.random.default_rng(11)
    return [image + generator.bytes(6_500) for image in draw_images(NUM_IMAGES, generator)]


@pytest.fixture(scope="module")
def folder(images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight MiB, so eight shards of one."""
    return write_folder(tmp_path_factory.mktemp("images") / "folder", images)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("undisturbed") / "shards"
    pack_here(folder, target)
    return content_of(target)


def test_number_of_processes_does_not_change_a_byte(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    shown: list[tuple[int, int]] = []
    result = pack_here(folder, tmp_path / "shards", num_workers=3, show=lambda done, total: shown.append((done, total)))
    assert content_of(tmp_path / "shards") == undisturbed
    assert len([name for name in undisturbed if name.startswith("shard-")]) == result.num_shards > 4
    assert shown[-1] == (NUM_IMAGES, NUM_IMAGES)
    assert {"manifest.json", "blocks.bin", "labels.bin"} < undisturbed.keys()
    assert not [name for name in undisturbed if name.startswith("task-") or name == "packing.json"]


def _program(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "pipelines" / "pack.py"), *map(str, arguments)]


def test_killed_and_started_again_it_ends_with_the_same_bytes(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "shards"
    command = _program(folder, target, "--workers", 1, "--shard-mib", 1)  # one: slow enough to be caught
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as program:
        deadline = time.monotonic() + 300
        while len(list(target.glob("task-*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(program.pid, signal.SIGKILL)  # the program alone: its processes end with it
    done = {path.name: path.stat().st_mtime_ns for path in target.glob("shard-*.arrow")}
    assert done
    assert not (target / "manifest.json").exists()
    with pytest.raises(DataError, match="is not packed completely; give the command of hvp-ray pack again to continue"):
        open_any(target)
    noted = [json.loads(path.read_bytes())["shards"][0]["name"] for path in target.glob("task-*.json")]
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "packed 1200 images in" in again.stdout
    assert content_of(target) == undisturbed
    for name in noted:  # what was done was not done again
        assert (target / name).stat().st_mtime_ns == done.get(name, (target / name).stat().st_mtime_ns)
    once_more = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "packed already" in once_more.stdout


def test_interrupted_it_ends_at_once_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    command = _program(folder, tmp_path / "shards", "--workers", 1, "--shard-mib", 1)  # one: slow enough to be caught
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # programs in the background inherit that it is ignored
    try:
        program = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with program:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "shards").glob("task-*.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to all of its processes
        _, said = program.communicate(timeout=30)
    assert program.returncode == 130
    assert said == "stopped; give the same command again to continue\n"


def test_shard_that_was_half_written_is_written_again(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "shards"
    with pytest.raises(DataError, match="is unreadable: .*without --strict"):
        pack_here(_with_damage(folder, tmp_path / "damaged", [1_100]), target, is_strict=True)
    first = next(iter(sorted(target.glob("shard-*.arrow"))))
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"another source or other settings \(source_fingerprint"):
        pack_here(folder, target)
    with pytest.raises(DataError, match="without --strict"):
        pack_here(tmp_path / "damaged", target, is_strict=True)
    assert first.read_bytes() == undisturbed[first.name]


def _with_damage(folder: Path, to: Path, indices: list[int]) -> Path:
    for path in folder.rglob("*.png"):
        copy = to / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"no image" if int(path.stem) in indices else path.read_bytes())
    return to


def test_other_processes_of_the_caller_survive(images: list[bytes], tmp_path: Path) -> None:
    small = write_folder(tmp_path / "folder", images[:20])
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    pack_here(small, tmp_path / "shards", num_workers=1)
    other.join(timeout=0.5)  # a signal that was sent has arrived by then
    survived = other.is_alive()
    other.kill()
    other.join()
    assert survived


def test_unreadable_images_are_left_out_listed_and_counted(folder: Path, images: list[bytes], tmp_path: Path) -> None:
    damaged = _with_damage(folder, tmp_path / "damaged", [5, 1_000])
    result = pack_here(damaged, tmp_path / "shards", num_workers=2)
    assert (result.num_images, result.num_unreadable) == (NUM_IMAGES - 2, 2)
    lines = [json.loads(line) for line in (tmp_path / "shards" / "unreadable.jsonl").read_text().splitlines()]
    assert [line["source_id"] for line in lines] == [5, 1_000]
    assert lines[1]["path"] == "class-2/01000.png"
    assert "not an image" in lines[1]["reason"]
    kept = [image for index, image in enumerate(images) if index not in (5, 1_000)]
    assert open_any(tmp_path / "shards").read(range(NUM_IMAGES - 2)) == kept


def test_good_images_of_every_kind_are_packed_byte_for_byte(tmp_path: Path) -> None:
    """More than 8 bits a channel, whatever black and white are; a turned TIFF; EXIF that is garbage."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph, tomogram = np.zeros((9, 12, 3), np.uint8), np.full((9, 12), -1000, np.int16)
    images = [
        made_intensities.png16(np.full((9, 12), 4095, np.uint16)),
        made_intensities.tiff_of(tomogram),
        encode(photograph, "TIFF", exif=exif),
        encode(photograph, "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + b"\xee" * 40),
    ]
    result = pack_here(write_folder(tmp_path / "images", images, num_classes=2), tmp_path / "shards")
    assert (result.num_images, result.num_unreadable) == (4, 0)
    assert open_any(tmp_path / "shards").read(range(4)) == images


def test_source_that_is_mostly_unreadable_stops(folder: Path, tmp_path: Path) -> None:
    damaged = _with_damage(folder, tmp_path / "damaged", list(range(0, NUM_IMAGES, 10)))
    with pytest.raises(DataError, match=r"images are unreadable, more than --max-unreadable-fraction 0.01"):
        pack_here(damaged, tmp_path / "shards")
    assert not (tmp_path / "shards" / "manifest.json").exists()
    result = pack_here(damaged, tmp_path / "shards", config={"max_unreadable_fraction": 0.2})
    assert result.num_unreadable == NUM_IMAGES // 10


def test_nothing_readable_is_an_error_for_few_images_too(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", [b"x"] * 3)
    with pytest.raises(DataError, match="3 of 3 images are unreadable.*class-0/00000.png: not an image"):
        pack_here(tmp_path / "folder", tmp_path / "shards")


def test_file_that_goes_away_while_it_is_packed_is_left_out(images: list[bytes], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", images[:9])
    source, root = open_for_packing(str(folder), DataConfig(source=str(folder)))
    plan = plan_packing(source, DataConfig(source=str(folder)), shard_mib=1, root=root)
    target = Target(str(tmp_path / "shards"))
    target.begin(plan)
    Path(source.describe(4)).unlink()
    assert pack_task(source, plan, target, 0, labels=None, is_strict=False) == (8, 1)
    commit(plan, target, class_names=(), max_unreadable_fraction=0.01)
    assert open_any(tmp_path / "shards").read(range(8)) == [*images[:4], *images[5:9]]
    left_out = json.loads((tmp_path / "shards" / "unreadable.jsonl").read_text())
    assert (left_out["source_id"], left_out["path"]) == (4, "class-1/00004.png")
    assert "missing or forbidden" in left_out["reason"]


def test_target_of_something_else_is_refused(folder: Path, images: list[bytes], tmp_path: Path) -> None:
    small = write_folder(tmp_path / "small", images[:9])
    pack_here(small, tmp_path / "shards")
    before = content_of(tmp_path / "shards")
    with pytest.raises(ConfigError, match=r"another source or other settings \(num_samples: 9 -> 1200"):
        pack_here(folder, tmp_path / "shards")
    with pytest.raises(ConfigError, match=r"shard_mib: 1 -> 2"):
        pack_here(small, tmp_path / "shards", shard_mib=2)
    assert content_of(tmp_path / "shards") == before
    with pytest.raises(ConfigError, match=r"is not empty \(class-0/00000.png"):
        pack_here(small, small)
    with pytest.raises(ConfigError, match="is a file"):
        pack_here(small, small / "class-0" / "00000.png")
    claim = os.open(tmp_path / "shards", os.O_RDONLY)
    fcntl.flock(claim, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another pack.py is packing there"):
        pack_here(small, tmp_path / "shards")
    os.close(claim)


def test_parquet_is_packed_by_whole_row_groups(images: list[bytes], tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-0.parquet", images[:800], row_group_size=300, total=1_100)
    write_parquet(tmp_path / "data" / "train-1.parquet", images[800:1_100], row_group_size=70, first=800, total=1_100)
    result = pack_here(tmp_path / "data", tmp_path / "shards", num_workers=2)
    source = open_any(tmp_path / "shards")
    assert source.read(range(1_100)) == images[:1_100]
    assert source.load_labels().tolist() == [index * 3 // 1_100 for index in range(1_100)]
    assert result.num_shards > 3
    pack_here(tmp_path / "shards", tmp_path / "again")  # shards are a source as any other
    assert open_any(tmp_path / "again").read(range(1_100)) == images[:1_100]


def test_process_that_dies_is_reported_with_what_it_had_in_hand(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    code = (
        "import os, sys; sys.path.insert(0, '.'); import multiprocessing, threading, time\n"
        "from tests.unit.data.made import pack_here\n"
        "def kill():\n"
        "    while not list(__import__('pathlib').Path(sys.argv[2]).glob('task-*')): time.sleep(0.01)\n"
        "    os.kill(multiprocessing.active_children()[0].pid, 9)\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=kill, daemon=True).start()\n"
        "    pack_here(sys.argv[1], sys.argv[2])\n"
    )
    script = tmp_path / "program.py"
    script.write_text(code)
    target = tmp_path / "shards"
    died = subprocess.run(
        [sys.executable, script, folder, target], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert "a process was killed" in died.stderr
    assert "these images were in flight: " in died.stderr
    pack_here(folder, target)
    assert content_of(target) == undisturbed


def test_verify_finds_a_flipped_bit_anywhere(folder: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    pack_here(folder, tmp_path / "shards")
    done: list[int] = []
    verify_shards(str(tmp_path / "shards"), lambda so_far, _total: done.append(so_far))
    assert done[-1] == sum(len(content) for name, content in undisturbed.items() if name.startswith("shard-"))
    shard = tmp_path / "shards" / "shard-000002-0000.arrow"
    content = bytearray(shard.read_bytes())
    content[10] ^= 4  # in no image
    shard.write_bytes(content)
    wrong = subprocess.run(
        _program("--verify", tmp_path / "shards"), capture_output=True, text=True, check=False, timeout=60
    )
    assert wrong.returncode == 1
    assert "shard-000002-0000.arrow is damaged" in wrong.stderr
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        verify_shards(str(folder), _nothing)


def test_program_says_what_it_needs() -> None:
    for arguments, message in (
        ((), "SOURCE and TARGET"),
        (("a",), "SOURCE and TARGET"),
        (("a", "b", "--workers", "0"), "1 or more"),
    ):
        wrong = subprocess.run(_program(*arguments), capture_output=True, text=True, check=False, timeout=60)
        assert wrong.returncode == 2
        assert message in wrong.stderr
