"""Where images come from, and what of them is used."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from hvp_ray.config.checks import AtLeast1, Checked, Fraction, Location, PathOrUri, Range, require


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Checked):
    """Where images come from."""

    path: ClassVar[str] = "data"

    source: Annotated[str, Location("`digits`, a path or a URI")]
    """Training images: `digits` (embedded), a folder of class folders, Parquet (a file, a folder, or a pattern such as
    FOLDER/train-*.parquet), WebDataset (.tar files, likewise), a Hugging Face data set saved to disk, an image list (a .csv,
    .tsv or .parquet file), or shards of hvp-ray pack. Parquet, WebDataset and shards also by URI:
    hf://datasets/OWNER/NAME, s3://bucket/prefix, gs://bucket/prefix, file:///; other S3 servers:
    s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http. Every node reads credentials from its environment."""

    num_images: AtLeast1 | None = None
    """Use only this many images: a fixed pseudo-random subset, equal for all seeds. None: all images."""

    test_source: PathOrUri | None = None
    """Labelled images for the final k-NN; their classes are matched by name with those of `source`. None: hold out
    `test_fraction` of the source."""

    test_fraction: Annotated[float, Range(least=0, below=1)] = 0.2
    """Fraction of the source held out from pretraining for the final k-NN, if `test_source` is None. 0: no evaluation."""

    max_unreadable_fraction: Fraction = 0.01
    """The run stops if a larger fraction of the images is unreadable; judged after 1,000 images."""

    max_image_pixels: AtLeast1 = 100_000_000
    """Images with more pixels than this count as unreadable. The header is checked before decoding, which protects from
    image bombs. Decoding takes about 7 bytes per pixel, or 12 with more than 8 bits per channel."""

    channels: Annotated[int, Range(least=1, most=32)] = 3
    """Channels of the images: 3 (RGB; grey becomes RGB, alpha is dropped), 1 (colour becomes grey), or the number that
    all images have, such as the bands of satellite images (TIFF files of several bands, `.npy` arrays, alpha as a fourth
    channel). `views.mean` and `views.std` need as many values: a run without them measures and prints them at its start, and
    a recipe `*-own` takes them. Colour operations that need RGB (saturation, hue, grey) are off for other numbers than 3."""

    intensity_range: tuple[float, float] | None = None
    """Values that become black and white in images with more than 8 bits per channel, in the images' own units: `0 4095`
    for 12 bits, `-1024 3071` for computed tomography. Values between are scaled linearly, others are clipped. All images
    share the range; images of up to 8 bits ignore it. None: a run with such images stops at its start and reports their
    range."""

    max_image_mib: AtLeast1 = 64
    """Encoded images larger than this (MiB) count as unreadable and are not read."""

    shuffle_window_images: AtLeast1 = 65_536
    """Parquet and shards: blocks (row groups, record batches) are permuted, then images inside windows of this many. The
    number of images: one permutation of all."""

    shuffle_window_mib: AtLeast1 = 1024
    """Parquet: a window holds at most this many MiB of images on average. The row groups of two windows should fit into
    `block_cache_mib`, because one image costs the reading of its row group. Shards ignore it."""

    block_cache_mib: AtLeast1 = 4096
    """Disk space of each node below TMPDIR (MiB) for decompressed Parquet row groups and for the headers of tar files, shared
    by its view workers. Shards behind a URI use it if they fit as a whole. The last process that uses it deletes it."""

    max_row_group_mib: AtLeast1 = 1024
    """A Parquet row group with more decompressed MiB of images than this stops the run before it is read. It would exceed
    the workers' memory; small files can hold huge row groups."""

    image_column: str | None = None
    """Column of images: `struct<bytes, path>` or binary in Parquet and Hugging Face data sets, paths in an image list.
    `sample.image` is a field of a struct. WebDataset: ending of the images, such as `jpg`. None: it is found by type and
    name, and several candidates are an error."""

    label_column: str | None = None
    """Column of labels, for evaluations only: integers (named by a `ClassLabel`), strings, categories, booleans, or floats
    without a fraction. WebDataset: ending of the labels, such as `cls`, or `json.NAME` for a value of the JSON files. None:
    it is found by type and name. If there is none, there is no evaluation."""

    def check_together(self, prefix: str) -> None:
        """Check that black is below white."""
        if self.intensity_range is not None:
            black, white = self.intensity_range
            allowed = "two finite numbers, black below white"
            fits = -math.inf < black < white < math.inf
            require(fits, f"{prefix}intensity_range", self.intensity_range, allowed)
