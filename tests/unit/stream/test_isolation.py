"""Only an image that crashes a process on its own is reported; a child that fails for another reason condemns nobody."""

import os
import signal
import sys
from pathlib import Path

import pytest

from hvp_ray.errors import StageError
from hvp_ray.stream.isolation import find_crashing_images

DECODER = "tests.unit.stream.test_isolation:decode_or_die"


def decode_or_die(image: bytes, *, max_pixels: int) -> None:
    """A decoder with a bug: some bytes kill the process, some only raise."""
    kind, _, counter = image.partition(b":")
    if kind.startswith(b"crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == b"exit":
        os._exit(1)  # as libjpeg does by default
    if kind == b"ended":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == b"raise":
        raise ValueError("ordinary damage")
    if kind == b"chatter":
        os.write(1, b"a library's message")
    if kind == b"hang":
        signal.pause()
    if kind == b"twice" and len(Path(os.fsdecode(counter)).read_bytes()) < 2:
        with open(counter, "ab") as file:
            file.write(b".")
        os.kill(os.getpid(), signal.SIGKILL)


def _find(images: list[bytes], *, decoder: str = DECODER, timeout_seconds: float = 60.0) -> list[int]:
    return find_crashing_images(
        images, max_pixels=10, decoder=decoder, timeout_seconds=timeout_seconds, start_pauses=()
    )


def test_crashing_images_are_found_among_healthy_and_damaged_ones() -> None:
    images = [b"fine", b"crash 1", b"raise", b"fine", b"exit", b"fine"]
    assert _find(images) == [1, 4]


def test_real_decoder_crashes_on_nothing() -> None:
    assert find_crashing_images([b"", b"no image", b"\xff\xd8\xff"], max_pixels=10) == []


def test_image_that_hangs_the_decoder_is_found() -> None:
    assert _find([b"fine", b"hang", b"fine"], timeout_seconds=0.5) == [1]


def test_what_a_library_prints_is_no_sign_of_life() -> None:
    assert _find([b"chatter", b"fine", b"crash"]) == [2]


def test_image_at_which_a_stranger_killed_the_process_is_innocent(tmp_path: Path) -> None:
    """The out-of-memory killer may come twice in a row, also while the image is decoded alone."""
    counter = tmp_path / "kills"
    counter.touch()
    assert _find([b"fine", b"twice:" + os.fsencode(counter), b"crash"]) == [2]
    assert counter.read_bytes() == b".."


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ImportError('libjpeg.so.8 is missing')", "exit status 1.*libjpeg.so.8 is missing"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_child_that_dies_while_it_starts_condemns_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    (tmp_path / "broken_decoder.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(StageError, match=f"(?s)could not start.*{reason}"):
        _find([b"fine", b"fine"], decoder="broken_decoder:decode")


def test_child_that_cannot_be_made_condemns_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StageError, match="could not start.*No such file"):
        _find([b"fine"])


def test_child_that_is_asked_to_end_condemns_nobody() -> None:
    with pytest.raises(StageError, match="was ended from outside.*SIGTERM"):
        _find([b"fine", b"ended"])
