"""Paths and URIs through one layer: the same calls, the same results."""

from pathlib import Path

import pyarrow.fs as pafs
import pytest

from hvp_ray.files import Folder, OpenFile, StorageError, delete_folder, place_in, read_file, retried, write_file


@pytest.fixture(params=["path", "uri"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "folder"
    return str(folder) if request.param == "path" else folder.as_uri()


def test_whole_files_are_written_listed_read_and_deleted(location: str) -> None:
    folder = Folder(location)
    assert folder.names() == []
    assert folder.read("a/b.json.gz") is None
    folder.write("a/b.json.gz", b"not compressed")
    write_file(place_in(location, "c"), b"one")
    write_file(place_in(location, "c"), b"two")
    assert folder.names() == ["a/b.json.gz", "c"]
    assert folder.names("a") == ["a/b.json.gz"]
    assert folder.read("a/b.json.gz") == b"not compressed"
    assert read_file(place_in(location, "c")) == b"two"
    assert read_file(place_in(location, "c", "below a file")) is None
    folder.delete("c")
    folder.delete("c")
    assert folder.names() == ["a/b.json.gz"]
    delete_folder(location)
    assert folder.names() == []
    delete_folder(location)


def test_ranges_are_exact_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    counts: list[int] = []
    filesystem = pafs.LocalFileSystem()
    file = OpenFile(filesystem, str(tmp_path / "a"), size=10, shown="the file", count=counts.append)
    assert file.read_at(3, 4) == b"3456"
    with pytest.raises(StorageError, match="the file ends 2 bytes too early"):
        file.read_at(8, 4)
    assert counts == [4, 2]
    with pytest.raises(StorageError, match="absent"):
        OpenFile(filesystem, str(tmp_path / "absent"), size=1, shown="absent", count=counts.append)


def test_storage_failures_are_retried_and_missing_files_are_not() -> None:
    calls: list[Exception] = [OSError("down"), OSError("down")]

    def act() -> str:
        if calls:
            raise calls.pop()
        return "up"

    assert retried(act, "acting", pauses=(0.0, 0.0)) == "up"
    calls += [OSError("down")] * 3
    with pytest.raises(OSError, match="down"):
        retried(act, "acting", pauses=(0.0,))
    calls[:] = [FileNotFoundError("absent")] * 2
    with pytest.raises(FileNotFoundError):
        retried(act, "acting", pauses=(0.0,))
    assert len(calls) == 1
