"""Pack images into shards: a few large, checked files instead of millions of small ones, still read image by image.

hvp-ray pack SOURCE TARGET [--workers N] ...
hvp-ray pack --verify TARGET

SOURCE is a folder of class folders, Parquet, WebDataset (a path, hf://, s3://, gs://), a Hugging Face data set saved to disk,
or an image list; TARGET a new folder (a path, s3://, gs://).
Every image is decoded once. Images that cannot be decoded are left out and listed in TARGET/unreadable.jsonl. Images keep
their order and bytes. If packing was stopped or killed, the same command continues. Then train with --data.source TARGET.
"""

import os
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from hvp_ray.cli.command_line import exit_status, parse_options, say
from hvp_ray.config import DataConfig
from hvp_ray.config.checks import AtLeast1, Checked, Fraction
from hvp_ray.errors import ConfigError
from hvp_ray.files import place_in

_LINE_SECONDS = 10.0
_MIB = 2**20


_DEFAULTS = DataConfig(source="-")


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of packing."""

    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = None
    """Images; see above."""

    target: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")] = None
    """Folder for the shards: new, empty, or begun by the same command."""

    verify: Annotated[str | None, tyro.conf.arg(metavar="TARGET")] = None
    """Only read all shards of TARGET and compare their digests."""

    workers: AtLeast1 | None = None
    """Processes; the shards do not depend on it. None: one for each CPU of this process."""

    shard_mib: AtLeast1 = 128
    """A shard is closed at this many MiB of images; a process needs twice that."""

    strict: bool = False
    """Stop at the first unreadable image instead of leaving it out."""

    max_unreadable_fraction: Fraction = _DEFAULTS.max_unreadable_fraction
    """Stop if a larger fraction is unreadable, checked after 1,000 images."""

    image_column: str | None = None
    """Column of images; see data.image_column. None: it is found."""

    label_column: str | None = None
    """Column of labels; see data.label_column. None: it is found."""

    max_image_pixels: AtLeast1 = _DEFAULTS.max_image_pixels
    """Images with more pixels count as unreadable."""

    channels: AtLeast1 = _DEFAULTS.channels
    """Channels of the images; see data.channels."""

    max_image_mib: AtLeast1 = _DEFAULTS.max_image_mib
    """Encoded images that are larger count as unreadable."""


class Display:
    """A progress bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._bar: Any = None
        self._line_at = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Show the progress."""
        if self._is_terminal:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, initial=done, unit=self._unit, unit_scale=True, dynamic_ncols=True)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._line_at > _LINE_SECONDS:
            self._line_at = time.monotonic()
            say(f"{done} of {total} {self._unit} ({done / total:.0%})")

    def close(self) -> None:
        """Leave the bar on its line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def pack(source: str, target: str, options: Options) -> None:
    """Pack, or continue packing.

    Raises:
        HvpRayError: the message is for the user.
    """
    from hvp_ray.data.inventory import inventory_of
    from hvp_ray.data.packing import open_for_packing
    from hvp_ray.data.packing_pool import pack as run_pack

    config = DataConfig(
        source=source,
        image_column=options.image_column,
        label_column=options.label_column,
        max_image_pixels=options.max_image_pixels,
        max_image_mib=options.max_image_mib,
        channels=options.channels,
        max_unreadable_fraction=options.max_unreadable_fraction,
    )
    for line in inventory_of(open_for_packing(source, config)[0], source).lines("source"):
        say(line)
    display = Display("images")
    started = time.monotonic()
    try:
        result = run_pack(
            source,
            target,
            config,
            shard_mib=options.shard_mib,
            num_workers=options.workers or len(os.sched_getaffinity(0)),
            is_strict=options.strict,
            show=display,
        )
    finally:
        display.close()
    what = f"{result.num_images} images in {result.num_shards} shard(s), {result.num_bytes / _MIB:.1f} MiB: {target}"
    if result.was_complete:
        say(f"packed already: {what}")
    else:
        say(f"packed {what} ({time.monotonic() - started:.0f} s)")
    if result.num_unreadable:
        listed = place_in(target, "unreadable.jsonl")
        say(f"{result.num_unreadable} image(s) could not be decoded and were left out: see {listed}")
    say(f"train with --data.source {target}")


def verify(location: str) -> None:
    """Read all shards and compare their digests.

    Raises:
        HvpRayError: the message is for the user.
    """
    from hvp_ray.data.packing import verify_shards

    display = Display("bytes")
    try:
        manifest = verify_shards(location, display)
    finally:
        display.close()
    say(f"good: {manifest.num_images} images in {len(manifest.shards)} shard(s), every byte as it was packed")


def main(arguments: list[str]) -> int:
    """Pack or verify; return the exit status."""

    def work() -> None:
        options = parse_options(Options, arguments, program="hvp-ray pack", description=__doc__ or "")
        if options.verify is not None:
            if options.source is not None:
                raise ConfigError("--verify TARGET takes no other argument")
            verify(options.verify)
        elif options.source is None or options.target is None:
            raise ConfigError("give SOURCE and TARGET, or --verify TARGET")
        else:
            pack(options.source, options.target, options)

    return exit_status(work, stopped="stopped; give the same command again to continue")
