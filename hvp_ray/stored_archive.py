"""Refuses compressed zip archives. hvp_ray's own (torch's checkpoints, NumPy's features) are never compressed.

A small file can therefore not expand into more memory than its size.
"""

import zipfile
from io import BytesIO
from pathlib import Path


def check_stored_archive(archive: Path | BytesIO, *, num_bytes: int) -> None:
    """Check that no part is compressed, and that all parts together are no larger than the archive.

    Args:
        archive: a file, or its content.
        num_bytes: its size.

    Raises:
        ValueError: a part is compressed.
        zipfile.BadZipFile: it is no archive.
        OSError: it cannot be read.
    """
    with zipfile.ZipFile(archive) as opened:
        parts = opened.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > num_bytes:
        raise ValueError("the archive is compressed")
