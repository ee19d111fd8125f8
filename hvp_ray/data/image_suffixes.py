"""Endings of the names of single images that are read (`decode.py`)."""

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc", ".tga", ".avif", ".avifs",
    ".heic", ".heif", ".hif",
)  # fmt: skip
