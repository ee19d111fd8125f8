"""Only an image that crashes a process on its own is reported."""

import os
import signal

from hvp_ray.stream.isolation import find_crashing_images

DECODER = "tests.unit.stream.test_isolation:decode_or_die"


def decode_or_die(image: bytes, *, max_pixels: int) -> None:
    """A decoder with a bug: some bytes kill the process, some only raise."""
    if image.startswith(b"crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if image.startswith(b"raise"):
        raise ValueError("ordinary damage")


def test_crashing_images_are_found_among_healthy_and_damaged_ones() -> None:
    images = [b"fine", b"crash 1", b"raise", b"fine", b"crash 2", b"fine"]
    assert find_crashing_images(images, max_pixels=10, decoder=DECODER) == [1, 4]


def test_real_decoder_crashes_on_nothing() -> None:
    assert find_crashing_images([b"", b"no image", b"\xff\xd8\xff"], max_pixels=10) == []
