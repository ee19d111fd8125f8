"""Find the images that crash a decoder, one by one, in a process that may die.

A view worker that keeps dying may be a victim of a bad image or of a bad machine. Here every image of a batch is
decoded by a child process; where the child dies, the image at hand is tried once more, alone. Only an image that
crashes alone is reported, so that random kills do not condemn healthy images.
"""

import importlib
import pickle
import subprocess
import sys
from collections.abc import Sequence

DECODER = "hvp_ray.data.decode:decode_rgb"
"""module:function that is called as f(image, max_pixels=...)."""

CRASHES_DECODER = "crashes the decoder"
"""Reason in the journal of unreadable images."""


def find_crashing_images(
    images: Sequence[bytes], *, max_pixels: int, decoder: str = DECODER, timeout_seconds: float = 120.0
) -> list[int]:
    """Return the indices of images on which a process dies (or hangs) when it decodes nothing else.

    An image that merely fails to decode is not reported: that is an ordinary error.
    """
    crashing = []
    start = 0
    while start < len(images):
        num_survived = _num_survived(images[start:], max_pixels, decoder, timeout_seconds)
        suspect = start + num_survived
        if suspect >= len(images):
            break
        if _num_survived(images[suspect : suspect + 1], max_pixels, decoder, timeout_seconds) == 0:
            crashing.append(suspect)
        start = suspect + 1
    return crashing


def _num_survived(images: Sequence[bytes], max_pixels: int, decoder: str, timeout_seconds: float) -> int:
    """Decode images in a child process; return how many it got through."""
    job = pickle.dumps((list(images), max_pixels, decoder))
    command = [sys.executable, "-m", "hvp_ray.stream.isolation"]
    try:
        child = subprocess.run(command, input=job, capture_output=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired as error:
        return len(error.stdout or b"")
    return len(child.stdout)


def _decode_all() -> None:
    """Child: decode what comes on standard input and write one byte for each image survived."""
    images, max_pixels, decoder = pickle.load(sys.stdin.buffer)  # our own parent wrote it
    module, function = decoder.split(":")
    decode = getattr(importlib.import_module(module), function)
    for image in images:
        try:
            decode(image, max_pixels=max_pixels)
        except Exception:  # noqa: BLE001 (an ordinary failure to decode is not a crash)
            pass
        sys.stdout.buffer.write(b".")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _decode_all()
