"""Pack images into shards: a few large, checked files instead of millions of small ones, still read image by image.

hvp-ray pack SOURCE TARGET [--workers N] ...
hvp-ray pack --verify TARGET

SOURCE is a folder of class folders or Parquet (a path, hf://, s3://, gs://); TARGET a new folder (a path, s3://, gs://).
Every image is decoded once. Images that cannot be decoded are left out and listed in TARGET/unreadable.jsonl. Images keep
their order and bytes. If packing was stopped or killed, the same command continues. Then train with --data.source TARGET.
"""

import argparse
import os
import sys
import time
from typing import Any

from hvp_ray.cli.command_line import exit_status, say
from hvp_ray.config import DataConfig
from hvp_ray.files import place_in

_LINE_SECONDS = 10.0
_MIB = 2**20


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Return the options, or exit with a message if they are wrong."""
    defaults = DataConfig(source="-")
    parser = argparse.ArgumentParser(
        prog="hvp-ray pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="images; see above")
    add("target", nargs="?", metavar="TARGET", help="folder for the shards: new, empty, or started by the same command")
    add("--verify", metavar="TARGET", help="only read all shards of TARGET and compare their digests")
    add("--workers", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes; the shards do not depend on it (default: the CPUs of this process, %(default)s)")  # fmt: skip
    add("--shard-mib", type=_positive, default=128, metavar="N",
        help="a shard is closed at this many MiB of images; a process needs twice that (default: %(default)s)")  # fmt: skip
    add("--strict", action="store_true", help="stop at the first unreadable image instead of leaving it out")
    add("--max-unreadable-fraction", type=float, default=defaults.max_unreadable_fraction, metavar="F",
        help="stop if a larger fraction is unreadable, checked after 1,000 images (default: %(default)s)")  # fmt: skip
    add("--image-column", default=defaults.image_column, help="Parquet: column of images (default: %(default)s)")
    add("--label-column", default=defaults.label_column, help="Parquet: column of labels (default: %(default)s)")
    add("--max-image-pixels", type=_positive, default=defaults.max_image_pixels, metavar="N",
        help="larger images count as unreadable (default: %(default)s)")  # fmt: skip
    add("--max-image-mib", type=_positive, default=defaults.max_image_mib, metavar="N",
        help="larger encoded images count as unreadable (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.verify is not None and options.source is not None:
        parser.error("--verify TARGET takes no other argument")
    if options.verify is None and options.target is None:
        parser.error("give SOURCE and TARGET, or --verify TARGET")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: 1 or more")
    return number


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


def pack(options: argparse.Namespace) -> None:
    """Pack, or continue packing.

    Raises:
        HvpRayError: the message is for the user.
    """
    from hvp_ray.data.inventory import inventory_of
    from hvp_ray.data.packing import open_for_packing
    from hvp_ray.data.packing_pool import pack as run_pack

    config = DataConfig(
        source=options.source,
        image_column=options.image_column,
        label_column=options.label_column,
        max_image_pixels=options.max_image_pixels,
        max_image_mib=options.max_image_mib,
        max_unreadable_fraction=options.max_unreadable_fraction,
    )
    for line in inventory_of(open_for_packing(options.source, config)[0], options.source).lines("source"):
        say(line)
    display = Display("images")
    started = time.monotonic()
    try:
        result = run_pack(
            options.source,
            options.target,
            config,
            shard_mib=options.shard_mib,
            num_workers=options.workers,
            is_strict=options.strict,
            show=display,
        )
    finally:
        display.close()
    what = f"{result.num_images} images in {result.num_shards} shard(s), {result.num_bytes / _MIB:.1f} MiB: {options.target}"
    if result.was_complete:
        say(f"packed already: {what}")
    else:
        say(f"packed {what} ({time.monotonic() - started:.0f} s)")
    if result.num_unreadable:
        listed = place_in(options.target, "unreadable.jsonl")
        say(f"{result.num_unreadable} image(s) could not be decoded and were left out: see {listed}")
    say(f"train with --data.source {options.target}")


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
    options = parse_options(arguments)
    work = (lambda: pack(options)) if options.verify is None else (lambda: verify(options.verify))
    return exit_status(work, stopped="stopped; give the same command again to continue")
