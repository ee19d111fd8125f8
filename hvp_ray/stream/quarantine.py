"""Decode images in a child process that may die, to find the ones that crash a decoder.

A view worker that keeps dying may be a victim of a bad image or of a bad machine. Here a child process decodes all images of
a batch. If the child dies, new children decode the image that it was decoding. Only an image that ends its process each
time counts as crashing, so random kills do not condemn healthy images.

If a child cannot start (a failed import, too little memory), the machine is at fault and not an image.
"""

import time
from collections.abc import Callable, Sequence

from hvp_ray.config import DataConfig
from hvp_ray.data.decode import decode_pixels
from hvp_ray.data.limited_process import CrashError, LimitedProcess
from hvp_ray.errors import StageError

DECODER = f"{__name__}:can_decode"
"""module:function, called as f(image, data)."""

CRASHES_DECODER = "crashes the decoder"
"""Reason in the journal of unreadable images."""

_DEATHS = 3
"""An image must end its process this often, in a row. The out-of-memory killer may strike twice by chance."""


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
    failures = {}
    with LimitedProcess(decoder, call_seconds=timeout_seconds, num_attempts=_DEATHS) as process:
        for index, image in enumerate(images):
            try:
                if not _call(process, image, data, start_pauses):
                    failures[index] = "cannot be decoded"
            except CrashError:
                failures[index] = CRASHES_DECODER
    return failures


def _call(process: LimitedProcess, image: bytes, data: DataConfig, start_pauses: Sequence[float]) -> bool:
    for pause in (*start_pauses, None):
        try:
            return bool(process.call(image, data))
        except OSError as error:
            if pause is None:
                raise StageError(
                    f"the search for images that crash the decoder failed: {error}; check memory and packages of this "
                    f"node, then start the run again with its name"
                ) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def can_decode(image: bytes, data: DataConfig, decode: Callable[[bytes, DataConfig], object] = decode_pixels) -> bool:
    """Decode an image in the child; an ordinary failure is not a crash."""
    try:
        decode(image, data)
    except Exception:  # noqa: BLE001 (libraries raise many types)
        return False
    return True
