"""(b) Views per second that leave one GPU, with and without decoding, beside kornia and torchvision on the same GPU."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import rivals
from benchmarks.gpu.check import Check
from benchmarks.photographs import CHAINS, MAX_IMAGE_PIXELS, VIEWS, Photographs, load_photographs
from benchmarks.results_file import Result, Results
from hvp_ray.config import DataConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb
from hvp_ray.recipes import get_recipe
from hvp_ray.views.render_dali import DaliExecution, DaliRenderer


def run(check: Check) -> Results:
    """Measure."""
    photographs = load_photographs(check.data, check.amount(128, 4)).first(check.amount(256, 4))
    repeats = check.amount(8, 1)
    yield from _copies(check, repeats)
    yield from _decoding(check, photographs, repeats)
    for chain, recipe in CHAINS.items():
        yield from _dali(check, chain, get_recipe(recipe).views, photographs, repeats)
    for chain, recipe in CHAINS.items():
        yield from _rivals(check, chain, get_recipe(recipe).views, photographs)


def _dali(check: Check, chain: str, views: ViewsConfig, photographs: Photographs, repeats: int) -> Results:
    num_global, num_local = VIEWS[chain]
    images = photographs.images
    plans = [
        (
            photographs.plan(views.global_views, num_global, epoch=epoch),
            photographs.plan(views.local_views, num_local, epoch=epoch, local=True) if views.local_views else None,
        )
        for epoch in range(repeats + 2)
    ]
    renderer = DaliRenderer(views, DataConfig(source="photographs"), name=check.renderer)
    turns = iter(plans)
    for _ in range(2):
        renderer.render(images, *next(turns))  # builds the graphs
    cpu_start = time.process_time()
    seconds = seconds_of(lambda: renderer.render(images, *next(turns)), repeats, warm_up=0)
    cpu_seconds = (time.process_time() - cpu_start) / repeats
    num_views = len(images) * (num_global + num_local)
    yield _rate(f"render.dali-gpu.{chain}.views_per_second", num_views, seconds, len(images))
    yield {
        "name": "render.dali-gpu.cpu_ms_per_view" if chain == "simsiam" else f"render.dali-gpu.{chain}.cpu_ms_per_view",
        "value": 1000 * cpu_seconds / num_views,
        "unit": "ms",
    }
    decoded = renderer.decode([np.frombuffer(image, np.uint8) for image in images])
    turns = iter(plans)

    def without_decode() -> None:
        global_plan, local_plan = next(turns)
        renderer.render_decoded(decoded, global_plan, views.global_views)
        if local_plan is not None and views.local_views is not None:
            renderer.render_decoded(decoded, local_plan, views.local_views)

    seconds = seconds_of(without_decode, repeats)
    yield _rate(f"render.dali-gpu.{chain}.without_decode.views_per_second", num_views, seconds, len(images))


def _decoding(check: Check, photographs: Photographs, repeats: int) -> Results:
    encoded = [np.frombuffer(image, np.uint8) for image in photographs.images]
    views = get_recipe(CHAINS["simsiam"]).views
    for threads in (1, 8):
        for load in (0.0, 0.65, 1.0)[2 if threads == 1 else 0 :]:
            renderer = DaliRenderer(
                views,
                DataConfig(source="photographs"),
                name=check.renderer,
                execution=DaliExecution(num_threads=threads, hw_decoder_load=load),
            )
            seconds = seconds_of(lambda renderer=renderer: renderer.decode(encoded), repeats)
            name = f"decode.dali-gpu.hw_decoder_load_{load:g}.{threads}_threads.images_per_second"
            yield {"name": name, "value": len(encoded) / seconds, "unit": "images/s"}


def _copies(check: Check, repeats: int) -> Results:
    """From the device to the host: the views of a batch into pinned and into pageable memory."""
    pixels = torch.randint(0, 256, (check.amount(4, 1), check.amount(256, 4), 224, 224, 3), dtype=torch.uint8)
    on_device = pixels.to(check.device)
    targets = {"pageable": torch.empty_like(pixels)}
    if check.device == "cuda":
        targets["pinned"] = torch.empty_like(pixels, pin_memory=True)
    for kind, target in targets.items():
        seconds = seconds_of(lambda target=target: target.copy_(on_device), repeats)
        name = f"render.copy_to_host.{kind}.gigabytes_per_second"
        yield {"name": name, "value": pixels.numel() / seconds / 1e9, "unit": "GB/s"}


def _rivals(check: Check, chain: str, views: ViewsConfig, photographs: Photographs) -> Results:
    """Without decoding, with one pinned copy to the host, as ours."""
    num_global, num_local = VIEWS[chain]
    device, count = torch.device(check.device), len(photographs.images)
    decoded = [_channels_first(decode_rgb(image, max_pixels=MAX_IMAGE_PIXELS)) for image in photographs.images[:32]]
    raw = [decoded[index % len(decoded)].to(device) for index in range(count)]
    scaled = torch.stack(
        [
            torch.nn.functional.interpolate(
                image[None].float() / 255, size=(256, 256), mode="bilinear", antialias=True
            )[0]
            for image in raw
        ]
    )
    few = raw[: check.amount(32, 2)]
    for name, images, repeats in (("kornia-gpu", scaled, 4), ("torchvision-gpu", few, 2)):
        make = rivals.kornia_views if name == "kornia-gpu" else rivals.torchvision_views
        try:
            work = [make(images, views.global_views, index) for index in range(num_global)]
            if views.local_views is not None:
                work += [make(images, views.local_views, index) for index in range(num_local)]
        except ImportError as error:
            yield {"name": f"render.{name}.{chain}.without_decode.views_per_second", "value": None, "unit": str(error)}
            continue

        def render(work: list[rivals.Views] = work) -> None:
            for one_view in work:
                one_view().to("cpu", non_blocking=True)
            if device.type == "cuda":
                torch.cuda.synchronize()

        seconds = seconds_of(render, check.amount(repeats, 1))
        num_views = len(images) * (num_global + num_local)
        yield _rate(f"render.{name}.{chain}.without_decode.views_per_second", num_views, seconds, len(images))


def _channels_first(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()


def _rate(name: str, num_views: int, seconds: float, images: int) -> Result:
    return {"name": name, "value": num_views / seconds, "unit": "views/s", "images": images, "seconds": seconds}


def seconds_of(work: Callable[[], object], repeats: int, *, warm_up: int = 2) -> float:
    """Return the median wall time of a call that ends when its work has ended, after some to warm up."""
    seconds = []
    for _ in range(repeats + warm_up):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])
