"""Pixels of the CPU renderer and of DALI's CPU backend against torchvision, in uint8 levels: docs/parity.md.

python benchmarks/parity.py [--data PARQUET] [--images N] [--pictures DIR] [--markdown FILE]

Every operation and the whole chain of recipes, on photographs and on odd images, all of them with the same plan. torchvision
works on float tensors and rounds once (tests/torchvision_views.py). Without --data photographs are made up.
"""

import argparse
import dataclasses
import functools
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks.photographs import CHAINS, MAX_IMAGE_PIXELS, Photographs, load_photographs
from benchmarks.pixel_differences import OPERATIONS, Pixels, statistics_of, views_by_torchvision
from benchmarks.results_file import describe_machine
from hvp_ray.config import DataConfig, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb, read_size
from hvp_ray.recipes import get_recipe
from hvp_ray.records import ViewPlan
from hvp_ray.views.renderer import build_renderer
from tests.helpers import NEUTRAL, encode, photograph_like

ROOT = Path(__file__).resolve().parents[1]
PAIRS = (("cpu", "torchvision"), ("dali-cpu", "torchvision"), ("cpu", "dali-cpu"))
PANEL_PX, ZOOM = 56, 4
_INTENSITY_RANGE = (0.0, 65_535.0)
"""Of the odd image of 16 bits."""


def odd_images() -> dict[str, bytes]:
    """Return encoded images by kind."""
    generator = np.random.default_rng(0)
    photograph = photograph_like(generator, 300, 400)
    y, x = np.mgrid[0:300, 0:400]
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by a quarter
    deep = (x * 65_535 // 399).astype(np.uint16)
    return {
        "gradient": encode(np.stack([x * 255 // 399, y * 255 // 299, (x + y) * 255 // 698], -1).astype(np.uint8)),
        "checkerboard": encode(np.repeat((((x // 4 + y // 4) % 2) * 255)[..., None], 3, -1).astype(np.uint8)),
        "grayscale JPEG": encode(photograph[..., 0], "JPEG", quality=92),
        "CMYK JPEG": _saved(Image.fromarray(photograph).convert("CMYK"), "JPEG", quality=92),
        "JPEG with orientation tag": encode(photograph, "JPEG", quality=92, exif=turned),
        "1 px wide": encode(photograph[:, :1]),
        "16 bits of grey": _saved(Image.fromarray(deep), "PNG"),
    }


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def groups() -> dict[str, ViewGroupConfig]:
    """Return what is compared: single operations, then chains of recipes."""
    found = {
        name: ViewGroupConfig(size_px=224, even=dataclasses.replace(NEUTRAL, **changes))
        for name, changes in OPERATIONS.items()
    }
    for chain in ("simsiam", "simclr"):
        found[f"chain of {chain}"] = get_recipe(CHAINS[chain]).views.global_views
    dino = get_recipe(CHAINS["dino"]).views
    assert dino.global_views.odd is not None
    assert dino.local_views is not None
    found["chain of dino, even global views"] = ViewGroupConfig(size_px=224, even=dino.global_views.even)
    found["chain of dino, odd global views"] = ViewGroupConfig(size_px=224, even=dino.global_views.odd)
    found["chain of dino, local views"] = dino.local_views
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """Views of one group by every renderer, [V, B, S, S, 3]."""

    plan: ViewPlan
    by: dict[str, Pixels]

    def cells(self, images: list[int]) -> list[str]:
        """Return the row of a table, for some of the images."""
        cells = []
        for ours, theirs in PAIRS:
            numbers = statistics_of([self.by[ours][:, images]], [self.by[theirs][:, images]])
            mean, worst, above = (numbers[quantity][0] for quantity in ("mean", "worst", "above_8"))
            cells.append(f"{mean:.3f}, {worst:.0f}, {above:.3f} %")
        return cells


def render(encoded: Photographs, decoded: list[Pixels], group: ViewGroupConfig, num_views: int) -> Rendered:
    plan = encoded.plan(group, num_views)
    views = ViewsConfig(global_views=group, evaluation_resize_px=group.size_px)
    by = {"torchvision": views_by_torchvision(decoded, plan, group)}
    for name in ("cpu", "dali-cpu"):
        renderer = build_renderer(name, views, DataConfig(source="photographs", intensity_range=_INTENSITY_RANGE))
        batch = renderer.render(encoded.images, plan)
        assert not batch.failures
        by[name] = batch.global_pixels
    return Rendered(plan=plan, by=by)


def worst_case(rendered: Rendered, ours: str, images: list[int]) -> Pixels:
    """Return the surroundings of the value that differs most: ours, torchvision's, and the difference times 16."""
    mine, theirs = rendered.by[ours][:, images], rendered.by["torchvision"][:, images]
    difference = np.abs(mine.astype(np.int16) - theirs)
    view, image, row, column, _ = np.unravel_index(difference.argmax(), difference.shape)
    top, left = (int(np.clip(at - PANEL_PX // 2, 0, mine.shape[2] - PANEL_PX)) for at in (row, column))
    window = (view, image, slice(top, top + PANEL_PX), slice(left, left + PANEL_PX))
    panels = [mine[window], theirs[window], np.clip(difference[window] * 16, 0, 255).astype(np.uint8)]
    size = (PANEL_PX * ZOOM, PANEL_PX * ZOOM)
    zoomed = [cv2.resize(panel, size, interpolation=cv2.INTER_NEAREST) for panel in panels]
    return np.hstack([np.pad(panel, ((2, 2), (2, 2), (0, 0)), constant_values=255) for panel in zoomed])


def table(head: str, rows: dict[str, list[str]]) -> list[str]:
    columns = [head, *(f"{ours} - {theirs}" for ours, theirs in PAIRS)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Parquet file with photographs (default: made-up ones)")
    parser.add_argument("--images", type=int, default=16, help="photographs")
    parser.add_argument("--views", type=int, default=2, help="views of each image")
    parser.add_argument(
        "--pictures", type=Path, default=ROOT / "docs/images", help="folder of the picture of worst cases"
    )
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs/parity.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    photographs, odd = load_photographs(options.data, options.images), odd_images()
    size_of = functools.partial(read_size, max_pixels=MAX_IMAGE_PIXELS)
    encoded = Photographs(
        images=photographs.images + list(odd.values()),
        sizes=np.concatenate([photographs.sizes, [size_of(image) for image in odd.values()]]).astype(np.int32),
    )
    decode = functools.partial(decode_rgb, max_pixels=MAX_IMAGE_PIXELS, intensity_range=_INTENSITY_RANGE)
    decoded = [decode(image) for image in encoded.images]
    of_photographs = list(range(options.images))
    of_odd = list(range(options.images, len(decoded)))
    on_photographs, on_odd, by_kind, pictures = {}, {}, {}, []
    for name, group in groups().items():
        rendered = render(encoded, decoded, group, options.views)
        on_photographs[name], on_odd[name] = rendered.cells(of_photographs), rendered.cells(of_odd)
        print(name, *on_photographs[name], *on_odd[name], sep=" | ", flush=True)
        if name == "chain of simsiam":
            by_kind = {kind: rendered.cells([index]) for kind, index in zip(odd, of_odd, strict=True)}
            pictures = [worst_case(rendered, ours, of_photographs) for ours in ("cpu", "dali-cpu")]
    by_pil = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in photographs.images]
    decoding = statistics_of(decoded[: options.images], by_pil)
    machine = describe_machine(
        "torch", "torchvision", "opencv-python-headless", "simplejpeg", "pillow", "nvidia-dali-cuda130"
    )
    data = f"the first {options.images} of `{options.data.name}`" if options.data else f"{options.images} made-up ones"
    picture = options.pictures / "parity_worst.png"
    options.pictures.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(picture), np.vstack(pictures)[..., ::-1])
    link = Path(os.path.relpath(picture, options.markdown.parent)).as_posix()
    lines = [
        "# Parity of pixels",
        "",
        "Written by `python benchmarks/parity.py`; the bands that tests hold are in `tests/unit/views/`. Each cell: mean "
        "difference, worst value, share of values that differ by more than 8, in levels of uint8. The same plan for all; "
        "torchvision (the oracle) works on float tensors, is antialiased, and rounds before the blur and at the end.",
        "",
        "Made with: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
        "",
        f"## Photographs ({data}, {options.views} views of each)",
        "",
        *table("operation", on_photographs),
        "",
        f"Decoding, the CPU renderer against PIL: mean {decoding['mean'][0]:.3f}, worst {decoding['worst'][0]:.0f}.",
        "",
        f"## Odd images ({', '.join(odd)})",
        "",
        *table("operation", on_odd),
        "",
        "## SimSiam's chain, kind by kind",
        "",
        *table("image", by_kind),
        "",
        "## The worst case",
        "",
        f"SimSiam's chain on photographs, the {PANEL_PX} x {PANEL_PX} px around the value that differs most: rendered, "
        "torchvision's, and their difference times 16; above the CPU renderer, below DALI's CPU backend.",
        "",
        f"![Surroundings of the worst values]({link})",
    ]
    options.markdown.write_text("\n".join(lines) + "\n")
    print(f"table {options.markdown}\npicture {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
