"""(e) Memory of the device and of the process while DALI renders many batches."""

import time

import numpy as np
import psutil
import torch

from benchmarks.gpu.check import Check
from benchmarks.photographs import CHAINS, Photographs, load_photographs
from benchmarks.results_file import Results
from hvp_ray.config import DataConfig
from hvp_ray.recipes import get_recipe
from hvp_ray.views.render_dali import DaliRenderer

_EVERY = 50


def run(check: Check) -> Results:
    """Render 1,000 batches of 32 photographs in changing order, 4 views each, and fit lines through the memory used."""
    num_batches, size = check.amount(1000, 200), check.amount(32, 1)
    photographs = load_photographs(check.data, check.amount(128, 4))
    group = get_recipe(CHAINS["simsiam"]).views.global_views
    views = get_recipe(CHAINS["simsiam"]).views
    renderer = DaliRenderer(views, DataConfig(source="photographs"), name=check.renderer)
    generator, process = np.random.default_rng(0), psutil.Process()
    points: list[tuple[int, float, float]] = []
    start = time.perf_counter()
    before = _device_mib()
    for batch in range(num_batches + 1):
        rows = generator.permutation(len(photographs.images))[:size]
        some = Photographs(images=[photographs.images[row] for row in rows], sizes=photographs.sizes[rows])
        renderer.render(some.images, some.plan(group, 4, epoch=batch))
        if batch % _EVERY == 0:
            points.append((batch, _device_mib() - before, process.memory_info().rss / 2**20))
            yield {
                "name": f"memory.after_{batch}_batches",
                "value": list(points[-1][1:]),
                "unit": "MiB of device, host",
            }
    seconds = time.perf_counter() - start
    later = np.array([point for point in points if point[0] >= num_batches // 5])
    context = {"batches": num_batches, "images_per_batch": size, "views_per_image": 4, "seconds": seconds}
    for column, place in ((1, "device"), (2, "host")):
        slope = float(np.polyfit(later[:, 0], later[:, column], 1)[0]) * 1000
        yield {"name": f"memory.{place}.slope", "value": slope, "unit": "MiB per 1,000 batches", **context}
        for quantity, value in (
            ("first", points[0][column]),
            ("at_a_fifth", later[0, column]),
            ("last", points[-1][column]),
        ):
            yield {"name": f"memory.{place}.{quantity}", "value": float(value), "unit": "MiB"}
    yield {
        "name": "memory.points",
        "value": [[float(value) for value in point] for point in points],
        "unit": "batch, MiB",
    }


def _device_mib() -> float:
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20
