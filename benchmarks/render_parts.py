"""What the parts of the CPU renderer cost, measured inside of it, and the host's work for each image that a GPU renders."""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.photographs import MAX_IMAGE_PIXELS, VIEWS, Photographs
from benchmarks.results_file import Results
from hvp_ray.config import DataConfig, ViewsConfig
from hvp_ray.data.decode import read_size
from hvp_ray.data.source import open_source
from hvp_ray.views import render_cpu
from hvp_ray.views.color_batch import PlannedOperations

PARTS = {
    "decode": ("decode_pixels",),
    "resize": ("resize",),
    "colour": ("_recolour",),
    "blur": ("blur", "gaussian_kernel"),
    "solarize": ("_solarize",),
    "flip": ("_flip",),
}
"""Part -> functions of `render_cpu`. What is in none of them (copying crops, calling) is the rest."""


def measure(chain: str, views: ViewsConfig, photographs: Photographs, repeats: int, data: Path | None) -> Results:
    """Yield CPU ms per view of each part, medians over the turns.

    Args:
        chain: of operations.
        views: of its recipe.
        photographs: what is rendered.
        repeats: turns.
        data: where photographs are read from; None: reading is not a part.
    """
    num_global, num_local = VIEWS[chain]
    num_views = (num_global + num_local) * len(photographs.images)
    renderer = render_cpu.CpuRenderer(views, DataConfig(source="photographs"))
    turns: list[dict[str, float]] = []
    for turn, seconds in _turns(photographs, repeats, data):
        with _clock(seconds, "plan"):
            plan = photographs.plan(views.global_views, num_global, epoch=turn)
            local_plan = None
            if views.local_views is not None:
                local_plan = photographs.plan(views.local_views, num_local, epoch=turn, local=True)
        with ExitStack() as stack, _clock(seconds, "rest"):
            for part, names in PARTS.items():
                for name in names:
                    stack.enter_context(mock.patch.object(render_cpu, name, _timed(seconds, part, name)))
            renderer.render(photographs.images, plan, local_plan)
        seconds["rest"] -= sum(seconds.get(part, 0.0) for part in PARTS)
        turns.append(seconds)
    for part in turns[0]:
        value = 1000 * statistics.median(turn.get(part, 0.0) for turn in turns) / num_views
        yield {"name": f"render.cpu.{chain}.{part}.cpu_ms_per_view", "value": value, "unit": "ms", "part": part}


def measure_host_work(views: ViewsConfig, photographs: Photographs, repeats: int, data: Path | None) -> Results:
    """Yield CPU us per image of each part of the host's work before DALI's, medians over the turns.

    DALI's own part of decoding and the launch of kernels come on top, and need a GPU.

    Args:
        views: of SimSiam's recipe.
        photographs: what is prepared; plain JPEGs.
        repeats: turns.
        data: where photographs are read from; later turns read the node's cache of row groups. None: reading is no part.
    """
    from hvp_ray.views.render_dali import DaliRenderer, crops_of

    renderer = DaliRenderer(views, DataConfig(source="photographs"), name="dali-cpu")
    num_views, group = VIEWS["simsiam"][0], views.global_views
    turns: list[dict[str, float]] = []
    for turn, seconds in _turns(photographs, repeats, data):
        with _clock(seconds, "size"):
            for image in photographs.images:
                read_size(image, max_pixels=MAX_IMAGE_PIXELS)
        with _clock(seconds, "plan"):
            plan = photographs.plan(group, num_views, epoch=turn)
        with _clock(seconds, "check"):
            renderer.prepare(photographs.images, on_host=False)
        with _clock(seconds, "operations"):
            crops_of(plan, {})
            PlannedOperations.of(plan, group)
        turns.append(seconds | {"all": sum(seconds.values())})
    for part in turns[0]:
        value = 1e6 * statistics.median(turn[part] for turn in turns) / len(photographs.images)
        yield {"name": f"render.dali.host.{part}.cpu_us_per_image", "value": value, "unit": "us", "part": part}


def _turns(photographs: Photographs, repeats: int, data: Path | None) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (number of the turn, CPU seconds by part), after reading the photographs if `data` names their file."""
    source = None if data is None else open_source(str(data), DataConfig(source=str(data)))
    for turn in range(repeats):
        seconds: dict[str, float] = {}
        if source is not None:
            with _clock(seconds, "read"):
                source.read(range(len(photographs.images)))
        yield turn, seconds


@contextmanager
def _clock(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.thread_time()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.thread_time() - start


def _timed(seconds: dict[str, float], part: str, name: str) -> Any:
    function = getattr(render_cpu, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        with _clock(seconds, part):
            return function(*arguments, **options)

    return timed
