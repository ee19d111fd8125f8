"""simplejpeg with a bug, for processes that have this folder on their PYTHONPATH: a JPEG that ends in a word aborts them."""

import importlib
import os
import sys
from pathlib import Path

POISON = b"poison"

sys.path = [folder for folder in sys.path if Path(folder) != Path(__file__).parent]
del sys.modules[__name__]
real = importlib.import_module("simplejpeg")
sys.path.insert(0, str(Path(__file__).parent))  # child processes take this path
decode_soundly = real.decode_jpeg


def decode_jpeg(data: bytes, *arguments: object, **options: object) -> object:
    """Decode as the real one does, or die."""
    if bytes(data).endswith(POISON):
        os.abort()
    return decode_soundly(data, *arguments, **options)


real.decode_jpeg = decode_jpeg
