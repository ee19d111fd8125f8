"""Decoders with a bug. A file of its own, and light, because each child process of `quarantine` imports it."""

import os
import signal
from functools import partial
from pathlib import Path

from hvp_ray.config import DataConfig
from hvp_ray.data.decode import decode_pixels
from hvp_ray.stream.quarantine import can_decode


def _decode_or_die(image: bytes, data: DataConfig) -> None:
    """Decode as the real one does; an image that ends in this word kills the process."""
    if image.endswith(b"crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    decode_pixels(image, data)


def _decode_by_word(image: bytes, _data: DataConfig) -> None:
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


can_decode_or_die = partial(can_decode, decode=_decode_or_die)
can_decode_by_word = partial(can_decode, decode=_decode_by_word)
