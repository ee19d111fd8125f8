"""Decode images in a child process that may die, to find the ones that crash a decoder.

A view worker that keeps dying may be a victim of a bad image or of a bad machine. Here a child process decodes all images of
a batch. If the child dies, the image that it was decoding is decoded again, alone. Only an image that ends its process each
time counts as crashing, so random kills do not condemn healthy images.

A child reports that it is ready before it decodes. If it ends earlier (a failed import, too little memory), the machine is at
fault and not an image.
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
from typing import IO, Any

from hvp_ray.config import DataConfig
from hvp_ray.errors import StageError

DECODER = "hvp_ray.data.decode:decode_rgb"
"""module:function, called as f(image, max_pixels=..., intensity_range=...)."""

CRASHES_DECODER = "crashes the decoder"
"""Reason in the journal of unreadable images."""

_DEATHS_ALONE = 2
"""An image must end its process this often on its own. The out-of-memory killer may strike once by chance."""

_SENT_BY_OTHERS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that another process sends: the image is not their cause."""

_START_SECONDS = 120.0
"""A child that is not ready after this time hangs."""

_READY = b"r"
_DECODED, _UNREADABLE, _CRASHED = b".", b"x", b"!"
"""Fates of an image. A child writes the first two; its parent adds the third."""

_REASONS = {ord(_UNREADABLE): "cannot be decoded", ord(_CRASHED): CRASHES_DECODER}
_STDERR_BYTES = 2_000


class _MachineError(Exception):
    """A child ended for another reason than an image."""


def failures_apart(
    images: Sequence[bytes],
    data: DataConfig,
    *,
    decoder: str = DECODER,
    timeout_seconds: float = 60.0,
    start_pauses: Sequence[float] = (0.5, 2.0),
) -> dict[int, str]:
    """Decode images in a process that may die; return index -> reason for each one that fails.

    The reason is `CRASHES_DECODER` for images on which a process dies (or hangs) when it decodes nothing else.

    Args:
        images: encoded images.
        data: what the decoder accepts.
        decoder: see `DECODER`.
        timeout_seconds: a child that decodes one image for longer than this hangs.
        start_pauses: seconds before each new attempt after a child ended for another reason than an image.

    Raises:
        StageError: no child could start, or children were ended from outside. Nothing is known about the images.
    """
    options = {"max_pixels": data.max_image_pixels, "intensity_range": data.intensity_range}

    def fates_of(some: Sequence[bytes]) -> bytes:
        for pause in (*start_pauses, None):
            try:
                return _decode_in_child(some, options, decoder, timeout_seconds)
            except _MachineError as fault:
                if pause is None:
                    raise StageError(
                        f"the process that searches for images that crash the decoder {fault}; check memory and packages of "
                        f"this node, then start the run again with its name"
                    ) from fault
                time.sleep(pause)
        raise AssertionError("unreachable")

    fates = b""
    while len(fates) < len(images):
        fates += fates_of(images[len(fates) :])
        if suspect := images[len(fates) : len(fates) + 1]:
            alone = (fates_of(suspect) for _ in range(_DEATHS_ALONE))
            fates += next(filter(None, alone), _CRASHED)
    return {index: _REASONS[fate] for index, fate in enumerate(fates) if fate in _REASONS}


def _decode_in_child(images: Sequence[bytes], options: dict[str, Any], decoder: str, timeout_seconds: float) -> bytes:
    """Decode images in a child process; return the fates of those that it survived.

    Raises:
        _MachineError: the child could not start, or ended for another reason than an image.
    """
    command = [sys.executable, "-m", "hvp_ray.stream.quarantine"]
    try:
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
            pickle.dump((images, options, decoder), stdin)
            stdin.seek(0)
            with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr) as child:
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
    fates = signs.removeprefix(_READY)
    if len(fates) < len(images) and has_ended and -child.returncode in _SENT_BY_OTHERS:
        raise _MachineError(f"was ended from outside: {ended}")
    return fates


def _read_signs(stdout: int, timeout_seconds: float) -> tuple[bytes, bool]:
    """Return what a child wrote, and whether it ended by itself rather than staying silent for too long."""
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
    """Child: decode the images on standard input; write a sign when it is ready, and the fate of each image."""
    signs = os.dup(1)
    os.dup2(2, 1)  # a library may print
    images, options, decoder = pickle.load(sys.stdin.buffer)  # our own parent wrote it
    module, function = decoder.split(":")
    decode = getattr(importlib.import_module(module), function)
    os.write(signs, _READY)
    for image in images:
        try:
            decode(image, **options)
            fate = _DECODED
        except Exception:  # noqa: BLE001 (an ordinary failure to decode is not a crash)
            fate = _UNREADABLE
        os.write(signs, fate)


if __name__ == "__main__":
    _decode_all()
