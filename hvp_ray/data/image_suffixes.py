"""Endings of the names of single images that are read (`decode.py`, `bands.py`)."""

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc", ".tga", ".avif", ".avifs",
    ".heic", ".heif", ".hif",
)  # fmt: skip


def image_suffixes(channels: int) -> tuple[str, ...]:
    """Return the endings of images of this many channels. Arrays beside photographs are taken for masks or features."""
    return IMAGE_SUFFIXES if channels == 3 else (*IMAGE_SUFFIXES, ".npy")
