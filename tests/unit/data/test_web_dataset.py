"""WebDataset: samples, labels and damage of tar files, on a disk and at a URI."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvp_ray.data.source import Source
from hvp_ray.errors import DataError, LabelError
from hvp_ray.files import OpenFile, StorageError
from hvp_ray.stream.reading import read_images
from tests.s3_server import s3_server
from tests.unit.data.made import draw_images, open_any, pack_here, upload, write_parquet, write_tar

IMAGES = draw_images(6, np.random.default_rng(0))
Members = list[tuple[str, bytes]]


def _samples(labels: list[bytes], ending: str = "cls", first: int = 0) -> Members:
    """One image and one label for each, with the label before or after the image."""
    members: Members = []
    for index, label in enumerate(labels, first):
        sample = [(f"{index:03d}.png", IMAGES[index]), (f"{index:03d}.{ending}", label)]
        members += sample if index % 2 else sample[::-1]
    return members


def _left_out(source: Source) -> dict[str, int]:
    return {entry.reason: entry.count for entry in source.left_out}


def test_samples_of_all_files_are_read_in_their_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-001.tar", _samples([b"dog", b"cat", b"ant"], first=3))
    write_tar(tmp_path / "train-000.tar", _samples([b"cat\n", b"cat", b"dog"]))
    for location in (tmp_path, tmp_path / "train-*.tar", tmp_path.as_uri()):
        source = open_any(location)
        assert source.kind == "WebDataset"
        assert source.read([5, 0, 3, 3]) == [IMAGES[5], IMAGES[0], IMAGES[3], IMAGES[3]]
        assert source.load_labels().tolist() == [1, 1, 2, 2, 1, 0]
        assert source.load_class_names() == ("ant", "cat", "dog")
        assert source.num_bytes == sum(map(len, IMAGES))
        assert source.describe(4).endswith("/train-001.tar member 004.png")
        assert source.left_out == ()
    one = open_any(tmp_path / "train-001.tar")
    assert one.read([0, 1, 2]) == IMAGES[3:]
    assert one.shares_files_with(open_any(tmp_path)) and not one.shares_files_with(open_any(tmp_path / "train-000.tar"))


def test_index_of_many_samples_is_made_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", _samples([b"1", b"0"] * 3))
    monkeypatch.setattr("hvp_ray.data.tar_index._ROWS_AT_ONCE", 2)
    source = open_any(tmp_path)
    assert (source.read(range(6)), source.load_labels().tolist()) == (IMAGES, [1, 0] * 3)
    assert source.describe(3).endswith("member 003.png")


def test_the_webdataset_library_writes_what_is_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=4, verbose=0) as writer:
        for index, image in enumerate(IMAGES):
            writer.write({"__key__": f"deep/folder.of/{index}", "png": image, "json": {"label": index % 3, "width": 9}})
    source = open_any(tmp_path)
    assert source.read(range(6)) == IMAGES
    assert (source.load_labels().tolist(), source.load_class_names()) == ([0, 1, 2, 0, 1, 2], ())
    assert [
        sample["png"] for sample in webdataset.WebDataset(str(tmp_path / "{000..001}.tar"), shardshuffle=False)
    ] == IMAGES


JSON = [json.dumps({"width": 5, "class_id": index, "tags": {"name": "ab"[index]}}).encode() for index in (1, 0)]
LABELS: dict[str, tuple[Members, str | None, list[int], tuple[str, ...]]] = {
    "numbers": (_samples([b"3", b" -1 \n"]), None, [3, -1], ()),
    "a number too large": (_samples([b"3", b"9999999999"]), None, [0, 1], ("3", "9999999999")),
    "names": (_samples([b"dog", b"3"]), None, [1, 0], ("3", "dog")),
    "no bytes": (_samples([b"", b"2"]), None, [-1, 2], ()),
    "text": (_samples([b"b", b"a"], "txt"), None, [1, 0], ("a", "b")),
    "json": (_samples(JSON, "json"), None, [1, 0], ()),
    "name in json": (_samples(JSON, "json"), "json.tags.name", [1, 0], ("a", "b")),
    "bare json": (_samples([b"1.0", b"true"], "json"), None, [1, 1], ()),
    "cls before text": ([("a.jpg", IMAGES[0]), ("a.txt", b"a caption"), ("a.cls", b"4")], None, [4], ()),
    "text by option": ([("a.jpg", IMAGES[0]), ("a.txt", b"word"), ("a.cls", b"4")], "txt", [0], ("word",)),
    "own ending": ([("a.jpg", IMAGES[0]), ("a.plant.id", b"7")], "plant.id", [7], ()),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_found_next_to_the_image(tmp_path: Path, name: str) -> None:
    members, option, labels, names = LABELS[name]
    source = open_any(write_tar(tmp_path / "a.tar", members), label_column=option)
    assert source.load_labels().tolist() == labels
    assert source.load_class_names() == names


def test_several_values_of_a_json_file_are_no_label_and_captions_are_no_classes(tmp_path: Path) -> None:
    values = json.dumps({"class": 1, "target": 2}).encode()
    source = open_any(write_tar(tmp_path / "a.tar", _samples([values, values], "json")))
    with pytest.raises(LabelError, match=r"a\.tar: 2 values may be the label.*\['json.class', 'json.target'\]"):
        source.load_labels()
    captions = [
        member for index in range(1_100) for member in ((f"{index}.jpg", b"x"), (f"{index}.txt", b"%d cats" % index))
    ]
    source = open_any(write_tar(tmp_path / "b.tar", captions))
    with pytest.raises(LabelError, match="1,100 different labels of 1,100 images, such as '0 cats'; expected classes"):
        source.load_labels()
    source = open_any(write_tar(tmp_path / "c.tar", [("a.jpg", IMAGES[0])]))
    assert not source.has_labels
    with pytest.raises(LabelError, match=r"no sample has KEY.cls.*--data.label_column json.NAME"):
        source.load_labels()


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    members = [*_samples([b"1", b"2"]), ("000.npy", b"x"), ("._000.png", b"x"), ("lonely.cls", b"1"), ("001.txt", b"x")]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "000.png"
        tar.addfile(link)
    (tmp_path / "readme.md").write_text("x")
    assert _left_out(open_any(tmp_path)) == {
        ".md files": 1, ".npy files": 1, "hidden": 1, ".cls files": 1, ".txt files": 1, "links and devices": 1,
    }  # fmt: skip


def test_several_images_of_a_sample_are_an_error_that_names_the_option(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.left.png", IMAGES[0]), ("0.right.png", IMAGES[1]), ("0.cls", b"1")])
    with pytest.raises(
        DataError, match=r"0.left.png and 0.right.png.*--data.image_column: \['left.png', 'right.png'\]"
    ):
        open_any(path)
    source = open_any(path, image_column="right.png")
    assert (source.read([0]), source.load_labels().tolist()) == ([IMAGES[1]], [1])
    assert source.fingerprint() != open_any(path, image_column="left.png").fingerprint()
    with pytest.raises(DataError, match="no sample of the tar files has an image 'png'"):
        open_any(path, image_column="png")
    twice = write_tar(tmp_path / "b.tar", [("0.png", IMAGES[0]), ("0.png", IMAGES[1])])
    with pytest.raises(DataError, match="give each sample a key of its own"):
        open_any(twice)


def test_images_beside_tar_files_take_their_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "original.tar", _samples([b"1"]))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(IMAGES[0])
    source = open_any(tmp_path)
    assert (source.kind, _left_out(source)) == ("images in a folder", {".tar files": 1})
    assert open_any(tmp_path / "*.tar").kind == "WebDataset"


def test_tables_beside_tar_files_do_not_take_their_place(tmp_path: Path) -> None:
    """As img2dataset writes them. A table of images is the source, and the tar files are left out."""
    write_tar(tmp_path / "00000.tar", _samples([b"1"]))
    pq.write_table(pa.table({"url": ["http://x"], "key": ["000"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    for location in (tmp_path, tmp_path.as_uri()):
        source = open_any(location)
        assert (source.kind, source.read([0])) == ("WebDataset", [IMAGES[0]])
        assert _left_out(source) == {".parquet files": 1, ".json files": 1}
    write_parquet(tmp_path / "images.parquet", IMAGES[:2], row_group_size=2)
    (tmp_path / "00000.parquet").unlink()
    assert open_any(tmp_path).kind == "images in Parquet files"


def _with_long_names(tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in (("deep/" * 50 + "image.png", IMAGES[0]), ("ümlaut.png", IMAGES[1])):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read(tmp_path: Path, tar_format: int) -> None:
    (tmp_path / "a.tar").write_bytes(_with_long_names(tar_format))
    source = open_any(tmp_path)
    assert source.read([0, 1]) == IMAGES[:2]
    assert source.describe(1).endswith("a.tar member ümlaut.png")


def _damaged(content: bytes, at: int) -> bytes:
    return content[:at] + b"\xff" * 20 + content[at + 20 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in an image": (lambda tar: tar[: 3 * 512 + 100], "it ends in its member 000.png"),
    "cut in a header": (lambda tar: tar[: tar.index(b"003.png") + 100], "is damaged or not complete"),
    "cut in the padding": (lambda tar: tar[: tar.index(b"003.cls") - 5], "unexpected end of data"),
    "damaged header": (lambda tar: _damaged(tar, tar.index(b"003.png") + 100), "there is no header at byte"),
    "damaged first header": (lambda tar: _damaged(tar, 100), "invalid header|bad checksum"),
    "empty": (lambda tar: b"", "empty file"),
    "no tar": (lambda tar: b"this is a text\n" * 100, "is damaged or not complete"),
    "compressed": (gzip.compress, "is compressed, so single images cannot be read; decompress it"),
    "zeros": (lambda tar: bytes(10_240), "no sample of the tar files has an image"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_of_a_tar_file_is_one_sentence_that_names_it(tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGE[name]
    path = write_tar(tmp_path / "a.tar", _samples([b"1"] * 6))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=reason) as raised:
        open_any(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_member_that_claims_a_negative_or_huge_header_is_damage(tmp_path: Path) -> None:
    """A member that ends before it begins, as in CVE-2025-8194, and a long name of gigabytes."""
    for kind, size in ((b"0", -1024), (b"L", 2**31), (b"x", 2**31)):
        member = tarfile.TarInfo("0.png")
        member.type = kind
        header = bytearray(member.tobuf())
        huge = b"\x80" + size.to_bytes(11, "big") if size > 0 else b"\xff" * 4 + (2**64 + size).to_bytes(8, "big")
        header[124:136] = huge
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(
            write_tar(tmp_path / "b", [("a.png", b"x")]).read_bytes()[:1024] + bytes(header)
        )
        with pytest.raises(DataError, match="a.tar is damaged or not complete"):
            open_any(tmp_path / "a.tar")


def test_tar_file_that_becomes_shorter_is_a_failure_of_the_storage_and_no_damaged_image(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", _samples([b"1"] * 6))
    source = open_any(tmp_path)
    path.write_bytes(path.read_bytes()[:2_000])
    with pytest.raises(StorageError, match=r"a\.tar.* ends \d+ bytes too early"):
        source.read([5])


def test_processes_of_a_node_read_the_headers_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", _samples([b"1"] * 6))
    first = open_any(tmp_path)
    others = [open_any(tmp_path) for _ in range(2)]
    assert first.num_bytes_read > 0  # type: ignore[attr-defined]
    assert [other.num_bytes_read for other in others] == [0, 0]  # type: ignore[attr-defined]
    assert [other.fingerprint() for other in others] == [first.fingerprint()] * 2
    assert others[0].load_labels().tolist() == [1] * 6
    assert open_any(tmp_path, label_column="txt").has_labels is False


def test_tar_files_on_a_bucket_equal_those_on_a_disk_and_their_headers_take_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "here" / "a.tar", _samples([b"dog", b"cat", b"dog", b"cat"]))
    write_tar(tmp_path / "here" / "b.tar", _samples([b"ant", b"cat"], first=4))
    here = open_any(tmp_path / "here")
    num_requests = 0
    read_at = OpenFile.read_at

    def counted(file: OpenFile, offset: int, num_bytes: int) -> bytes:
        nonlocal num_requests
        num_requests += 1
        return read_at(file, offset, num_bytes)

    with s3_server() as uri:
        upload(tmp_path / "here", uri.format("/tars"))
        monkeypatch.setattr(OpenFile, "read_at", counted)
        source = open_any(uri.format("/tars"))
        assert num_requests == 2
        order = [3, 0, 5, 1, 4, 2]
        assert read_images(source, order).images == read_images(here, order).images == [IMAGES[i] for i in order]
        assert source.fingerprint() == here.fingerprint()
        assert source.load_labels().tolist() == here.load_labels().tolist() == [2, 1, 2, 1, 0, 1]
        pack_here(uri.format("/tars/*.tar"), tmp_path / "packed")
    packed = open_any(tmp_path / "packed")
    assert packed.read(range(6)) == IMAGES
    assert packed.load_class_names() == ("ant", "cat", "dog")
