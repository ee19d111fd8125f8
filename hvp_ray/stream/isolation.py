"""Find the images that crash a decoder, one by one, in a process that may die.

A view worker that keeps dying may be a victim of a bad image or of a bad machine. Here a child process decodes all images of
a batch. If it dies, the image that it was decoding is decoded again, alone. Only an image that ends its process each time is
reported, so random kills do not condemn healthy images.

A child reports that it is ready before it decodes. What ends it earlier (a failed import, too little memory) is a fault of
the machine and never of an image.
"""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import IO

from hvp_ray.errors import StageError

DECODER = "hvp_ray.data.decode:decode_rgb"
"""module:function that is called as f(image, max_pixels=...)."""

CRASHES_DECODER = "crashes the decoder"
"""Reason in the journal of unreadable images."""

_DEATHS_ALONE = 2
"""An image must end its process this often on its own. The out-of-memory killer may strike once by chance."""

_ASKED_TO_END = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that another process sends: the image is not their cause."""

_START_SECONDS = 120.0
"""A child that is not ready after this time hangs."""

_READY = b"r"
_SURVIVED = b"."
_STDERR_BYTES = 2_000


class _MachineError(Exception):
    """A child ended for another reason than an image."""


def find_crashing_images(
    images: Sequence[bytes],
    *,
    max_pixels: int,
    decoder: str = DECODER,
    timeout_seconds: float = 60.0,
    start_pauses: Sequence[float] = (0.5, 2.0),
) -> list[int]:
    """Return the indices of images on which a process dies (or hangs) when it decodes nothing else.

    An image that merely fails to decode is not reported: that is an ordinary error.

    Args:
        images: encoded images.
        max_pixels: passed to the decoder.
        decoder: see `DECODER`.
        timeout_seconds: a child that decodes one image for longer than this hangs.
        start_pauses: seconds before each new attempt if a child ends for another reason than an image.

    Raises:
        StageError: children could not start, or were ended from outside; nothing is known about the images.
    """

    def num_survived(some: Sequence[bytes]) -> int:
        for pause in (*start_pauses, None):
            try:
                return _decode_in_child(some, max_pixels, decoder, timeout_seconds)
            except _MachineError as fault:
                if pause is None:
                    raise StageError(
                        f"the process that looks for images that crash the decoder {fault}; check memory and packages of "
                        f"this node, then start the run again with its name to go on"
                    ) from fault
                time.sleep(pause)
        raise AssertionError("unreachable")

    crashing = []
    start = 0
    while start < len(images):
        suspect = start + num_survived(images[start:])
        if suspect >= len(images):
            break
        alone = images[suspect : suspect + 1]
        if all(num_survived(alone) == 0 for _ in range(_DEATHS_ALONE)):
            crashing.append(suspect)
        start = suspect + 1
    return crashing


def _decode_in_child(images: Sequence[bytes], max_pixels: int, decoder: str, timeout_seconds: float) -> int:
    """Decode images in a child process; return how many it got through.

    Raises:
        _MachineError: it could not start, or ended for another reason than an image.
    """
    command = [sys.executable, "-m", "hvp_ray.stream.isolation"]
    try:
        with tempfile.TemporaryFile() as job, tempfile.TemporaryFile() as stderr:
            pickle.dump((list(images), max_pixels, decoder), job)
            job.seek(0)
            with subprocess.Popen(command, stdin=job, stdout=subprocess.PIPE, stderr=stderr) as child:
                assert child.stdout is not None
                try:
                    signs, has_ended = _read_signs(child.stdout.fileno(), timeout_seconds)
                finally:
                    child.kill()  # it may hang
            ended = _describe_end(child.returncode, stderr) if has_ended else f"not ready after {_START_SECONDS:g} s"
    except OSError as error:
        raise _MachineError(f"could not start: {error}") from error
    if not signs.startswith(_READY):
        raise _MachineError(f"could not start: {ended}")
    num_survived = signs.count(_SURVIVED)
    if num_survived < len(images) and has_ended and -child.returncode in _ASKED_TO_END:
        raise _MachineError(f"was ended from outside: {ended}")
    return num_survived


def _read_signs(stdout: int, timeout_seconds: float) -> tuple[bytes, bool]:
    """Return the signs of a child, and whether it ended by itself: no if it was silent for too long."""
    signs = b""
    while wait([stdout], timeout_seconds if signs else _START_SECONDS):
        found = os.read(stdout, 65_536)
        if not found:
            return signs, True
        signs += found
    return signs, False


def _describe_end(returncode: int, stderr: IO[bytes]) -> str:
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - _STDERR_BYTES))
    last = stderr.read().decode(errors="replace").strip()
    names = {number.value: number.name for number in signal.Signals}
    how = f"exit status {returncode}" if returncode >= 0 else names.get(-returncode, f"signal {-returncode}")
    return f"{how}{': ' if last else ''}{last}"


def _decode_all() -> None:
    """Child: decode what comes on standard input; write a sign when it is ready, and one for each image survived."""
    signs = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no sign
    images, max_pixels, decoder = pickle.load(sys.stdin.buffer)  # our own parent wrote it
    module, function = decoder.split(":")
    decode = getattr(importlib.import_module(module), function)
    os.write(signs, _READY)
    for image in images:
        try:
            decode(image, max_pixels=max_pixels)
        except Exception:  # noqa: BLE001 (an ordinary failure to decode is not a crash)
            pass
        os.write(signs, _SURVIVED)


if __name__ == "__main__":
    _decode_all()
