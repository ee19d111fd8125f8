"""What would it save to render candidates small, score them, and render only the chosen views at full size?

python benchmarks/two_stage.py --data PARQUET [--images N] [--scoring-px PX ...] [--json FILE]

Bytes that leave the view workers and CPU time of rendering, for each image, of three ways:

one stage       every candidate at full size, as hvp_ray does
two stages      candidates at the scoring resolution, then the chosen views at full size from pixels that were kept
two, decoded    the same where the second stage decodes the image again (another worker, or no room to keep pixels)

Beside them what shipping each image once would take, encoded or decoded, with all views rendered beside the trainer. CPU time
of one thread, best of the repeats; the images are read before.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.results_file import describe_machine, open_results
from hvp_ray.config import DataConfig, RunConfig, TransformConfig, ViewGroupConfig
from hvp_ray.data.decode import decode_rgb
from hvp_ray.data.source import open_source
from hvp_ray.randomness import Purpose
from hvp_ray.recipes import get_recipe
from hvp_ray.records import ViewPlan
from hvp_ray.views.plan import draw_plan
from hvp_ray.views.render_cpu import CpuRenderer

RECIPES = ("simsiam-imagenet-r50-100ep", "dino-imagenet-vits16-100ep")
_MAX_PIXELS = 100_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Views of one size that are rendered together."""

    num_global: int
    num_local: int
    scale: float
    """Of the recipe's sizes."""

    def bytes_of(self, config: RunConfig) -> int:
        """Return the pixels of an image's views."""
        sizes = [(self.num_global, config.views.global_views.size_px)]
        if config.views.local_views is not None:
            sizes.append((self.num_local, config.views.local_views.size_px))
        return sum(number * 3 * round(size * self.scale) ** 2 for number, size in sizes)


def scaled(group: ViewGroupConfig, scale: float) -> ViewGroupConfig:
    """Return the group at another size; blur follows, because its width is in pixels of the view."""

    def transform(of: TransformConfig) -> TransformConfig:
        low, high = of.blur_sigma_px
        kernel = max(3, round(of.blur_kernel_px * scale) // 2 * 2 + 1)
        return dataclasses.replace(of, blur_sigma_px=(low * scale, high * scale), blur_kernel_px=kernel)

    return ViewGroupConfig(
        size_px=round(group.size_px * scale),
        even=transform(group.even),
        odd=None if group.odd is None else transform(group.odd),
    )


def render_seconds(config: RunConfig, images: list[bytes], pixels: list[NDArray[np.uint8]], stage: Stage) -> float:
    """Return CPU seconds of rendering one stage for all images, decoding included."""
    views = dataclasses.replace(
        config.views,
        global_views=scaled(config.views.global_views, stage.scale),
        local_views=None if config.views.local_views is None else scaled(config.views.local_views, stage.scale),
        masks=None,
    )
    ids = np.arange(len(images))
    heights, widths = (np.array([len(p) for p in pixels], np.int32), np.array([p.shape[1] for p in pixels], np.int32))

    def plan(purpose: Purpose, number: int, group: ViewGroupConfig) -> ViewPlan:
        return draw_plan(
            seed=0, purpose=purpose, epoch=0, sample_ids=ids, image_sizes=(heights, widths),  num_views=number, group=group
        )  # fmt: skip

    of_globals = plan(Purpose.GLOBAL_VIEWS, stage.num_global, views.global_views)
    of_locals = None
    if views.local_views is not None:
        of_locals = plan(Purpose.LOCAL_VIEWS, stage.num_local, views.local_views)
    renderer = CpuRenderer(views, DataConfig(source="photographs"))
    return seconds_of(lambda: renderer.render(images, of_globals, of_locals))


def seconds_of(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> int:
    """Print the counts of every recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="photographs, as data.source")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--scoring-px", nargs="+", type=int, default=[112, 96])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(options.data, DataConfig(source=options.data))
    images = source.read(list(range(min(options.images, source.num_samples))))
    pixels = [decode_rgb(image, max_pixels=_MAX_PIXELS) for image in images]
    encoded, decoded = (sum(map(len, images)) / len(images), sum(p.nbytes for p in pixels) / len(pixels))
    context = describe_machine("torch", "opencv-python-headless", "simplejpeg") | {"images": len(images)}
    print(", ".join(f"{name} {value}" for name, value in context.items()))
    print(f"an image shipped once: {encoded / 1000:.0f} kB encoded, {decoded / 1000:.0f} kB decoded")
    results = []
    for recipe in RECIPES:
        config = get_recipe(recipe)
        selection = config.selection
        every = Stage(num_global=selection.num_candidate_views, num_local=selection.num_local_views or 0, scale=1.0)
        chosen = Stage(num_global=2, num_local=selection.num_chosen_local_views or 0, scale=1.0)
        small = {
            px: dataclasses.replace(every, scale=px / config.views.global_views.size_px) for px in options.scoring_px
        }
        stages = [every, chosen, *small.values()]
        best = dict.fromkeys(stages, float("inf"))
        decode = float("inf")
        for _ in range(options.repeats):
            for stage in stages:
                best[stage] = min(best[stage], render_seconds(config, images, pixels, stage))
            decode = min(decode, seconds_of(lambda: [decode_rgb(image, max_pixels=_MAX_PIXELS) for image in images]))
        ms = {stage: 1000 * seconds / len(images) for stage, seconds in best.items()}
        decode_ms = 1000 * decode / len(images)
        rows = {"one stage": (every.bytes_of(config), ms[every])}
        for px, stage in small.items():
            shipped = stage.bytes_of(config) + chosen.bytes_of(config)
            twice = ms[stage] + ms[chosen]
            rows[f"two stages, {px} px"] = (shipped, twice - decode_ms)
            rows[f"two, decoded twice, {px} px"] = (shipped, twice)
        rows["random views"] = (chosen.bytes_of(config), ms[chosen])
        print(f"\n{recipe:<34}{'kB an image':>14}{'of one stage':>14}{'CPU ms':>10}{'of one stage':>14}")
        for name, (shipped, spent) in rows.items():
            of_bytes, of_ms = shipped / rows["one stage"][0], spent / rows["one stage"][1]
            print(f"{name:<34}{shipped / 1000:>14.0f}{of_bytes:>14.2f}{spent:>10.2f}{of_ms:>14.2f}", flush=True)
            for quantity, value, unit in (("bytes", shipped, "bytes/image"), ("cpu_ms", spent, "ms/image")):
                label = name.replace(",", "").replace(" ", "-")
                results.append(
                    {"name": f"two_stage.{config.method.name}.{label}.{quantity}", "value": value, "unit": unit}
                )
        print(f"(decoding alone {decode_ms:.2f} CPU ms)")
    with open_results(options.json, context) as keep:
        keep(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
