"""What a rendered view costs: CPU time of our renderers and of what others use, decoding included.

python benchmarks/render.py [--data PARQUET] [--images N] [--repeats N] [--chains NAME ...] [--json FILE]

Chains: SimSiam's and SimCLR's (4 views of 224 px of each photograph) and DINO's (2 of 224 px, 8 of 96 px). CPU time is
that of the whole process, threads of libraries included, each of which is told to use one; subjects take turns, and
medians over turns are reported. Everything ends with uint8 pixels in the host's memory, but `pil-torchvision-normalised`,
which ends as the authors' loader does, with normalised float32 tensors. Peers that are not installed are named and left
out (`uv pip install --group bench` has them). Without --data photographs are made up: that shows that the program runs,
and its numbers are of smoother pictures than real ones.

Last comes what the host does for an image before DALI decodes it on a GPU: reading, its size for the plan, the plan, the
check whether DALI may decode it, and arrays of the operations.
"""

import argparse
import functools
import importlib.util
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2 as T

from benchmarks import render_parts, rivals
from benchmarks.photographs import CHAINS, MAX_IMAGE_PIXELS, VIEWS, Photographs, load_photographs
from benchmarks.results_file import Result, describe_machine, open_results
from hvp_ray.config import DataConfig, RendererName, TransformConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb
from hvp_ray.recipes import get_recipe
from hvp_ray.views.renderer import build_renderer

TARGET_MS = {
    ("cpu", "simsiam"): 1.4,
    ("cpu", "simclr"): 1.6,
    ("cpu", "dino"): 0.7,
    ("dali-cpu", "simsiam"): 4.0,
}
"""(renderer, chain) -> at most, CPU ms per view. SimCLR's blur is wider; eight of DINO's ten views are small."""
TARGET_RATIO = {"pil-torchvision": 7.0, "albumentations-area": 1.3}
"""Peer -> how many times cheaper the CPU renderer shall be with SimSiam's chain."""
PACKAGE = {"albumentations-area": "albumentations", "kornia-gpu": "kornia", "dali-cpu": "nvidia", "dali-gpu": "nvidia"}

Render = Callable[[int], None]
"""Render all views of all photographs, once more; the argument is the number of the turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What every subject has to do."""

    chain: str
    views: ViewsConfig
    photographs: Photographs

    @property
    def num_views(self) -> int:
        """Of all photographs."""
        return sum(VIEWS[self.chain]) * len(self.photographs.images)

    def transforms(self) -> list[tuple[TransformConfig, int]]:
        """Return transform and size of every view of a photograph."""
        num_global, num_local = VIEWS[self.chain]
        views = [(self.views.global_views, index) for index in range(num_global)]
        if self.views.local_views is not None:
            views += [(self.views.local_views, index) for index in range(num_local)]
        return [(group.transform_of(index), group.size_px) for group, index in views]


def ours(task: Task, name: RendererName) -> Render:
    renderer = build_renderer(name, task.views, DataConfig(source="photographs"))
    num_global, num_local = VIEWS[task.chain]

    def render(turn: int) -> None:
        plan = functools.partial(task.photographs.plan, epoch=turn)
        local_views = task.views.local_views
        local_plan = plan(local_views, num_local, local=True) if local_views is not None else None
        renderer.render(task.photographs.images, plan(task.views.global_views, num_global), local_plan)

    return render


def pil_torchvision(task: Task, *, normalised: bool = False) -> Render:
    chains = [rivals.torchvision_chain(transform, size_px) for transform, size_px in task.transforms()]
    to_tensor = T.Compose(
        [T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize(task.views.mean, task.views.std)]
    )
    finish = to_tensor if normalised else np.asarray

    def render(turn: int) -> None:
        torch.manual_seed(turn)
        for image in task.photographs.images:
            decoded = Image.open(io.BytesIO(image)).convert("RGB")
            for chain in chains:
                finish(chain(decoded))

    return render


def albumentations_area(task: Task) -> Render:
    chains = [
        rivals.albumentations_chain(transform, size_px, seed=index)
        for index, (transform, size_px) in enumerate(task.transforms())
    ]

    def render(_: int) -> None:
        for image in task.photographs.images:
            decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
            for chain in chains:
                chain(image=decoded)

    return render


def kornia_gpu(task: Task) -> Render:
    """Decoded on the host, scaled to 256 px there, rendered on the device, copied back."""
    device, images = torch.device("cuda"), task.photographs.images

    def render(turn: int) -> None:
        torch.manual_seed(turn)
        scaled = [
            cv2.resize(decode_rgb(image, max_pixels=MAX_IMAGE_PIXELS), (256, 256), interpolation=cv2.INTER_AREA)
            for image in images
        ]
        batch = torch.from_numpy(np.stack(scaled)).to(device).permute(0, 3, 1, 2).float() / 255
        for chain in chains:
            (chain(batch) * 255).to(torch.uint8).cpu()

    chains = [rivals.kornia_chain(transform, size_px).to(device) for transform, size_px in task.transforms()]
    return render


SUBJECTS: dict[str, Callable[[Task], Render]] = {
    "cpu": lambda task: ours(task, "cpu"),
    "dali-cpu": lambda task: ours(task, "dali-cpu"),
    "dali-gpu": lambda task: ours(task, "dali-gpu"),
    "pil-torchvision": pil_torchvision,
    "pil-torchvision-normalised": functools.partial(pil_torchvision, normalised=True),
    "albumentations-area": albumentations_area,
    "kornia-gpu": kornia_gpu,
}


def reason_against(subject: str) -> str | None:
    """Return why a subject cannot be measured here."""
    package = PACKAGE.get(subject)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{'nvidia-dali-cuda130' if package == 'nvidia' else package} is not installed"
    if subject.endswith("-gpu") and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def measure_by_turns(renders: dict[str, Render], repeats: int) -> dict[str, list[float]]:
    """Return CPU seconds of every turn of every subject."""
    for render in renders.values():
        render(0)  # graphs, kernels and caches are made once
    seconds: dict[str, list[float]] = {subject: [] for subject in renders}
    for turn in range(1, repeats + 1):
        for subject, render in renders.items():
            start = time.process_time()
            render(turn)
            seconds[subject].append(time.process_time() - start)
    return seconds


def results_of(task: Task, subject: str, seconds: list[float], repeats: int) -> Result:
    middle = "" if task.chain == "simsiam" else f"{task.chain}."
    ms = [1000 * value / task.num_views for value in seconds]
    return {
        "name": f"render.{subject}.{middle}cpu_ms_per_view",
        "value": statistics.median(ms),
        "unit": "ms",
        "least": min(ms),
        "most": max(ms),
        "chain": task.chain,
        "views": "+".join(str(count) for count in VIEWS[task.chain] if count),
        "images": len(task.photographs.images),
        "repeats": repeats,
    }


def print_table(task: Task, results: dict[str, Result]) -> Iterator[Result]:
    """Print a chain's results; yield ratios."""
    num_global, num_local = VIEWS[task.chain]
    local = f" and {num_local} of {task.views.local_views.size_px} px" if task.views.local_views else ""
    layout = f"{num_global} views of {task.views.global_views.size_px} px{local} of each photograph"
    print(f"\n{task.chain}: {layout}, CPU ms per view")
    print(f"{'renderer':<30}{'median':>8}{'least':>8}{'most':>8}{'to cpu':>8}  target")
    base = results["cpu"]["value"]
    for subject, result in results.items():
        target = TARGET_MS.get((subject, task.chain))
        judged = "" if target is None else f"{target:g} ms: {'met' if result['value'] <= target else 'missed'}"
        ratio = result["value"] / base
        wanted = TARGET_RATIO.get(subject) if task.chain == "simsiam" else None
        if wanted is not None:
            judged = f"{wanted:g} times ours: {'met' if ratio >= wanted else 'missed'}"
        numbers = "".join(f"{result[key]:>8.2f}" for key in ("value", "least", "most"))
        print(f"{subject:<30}{numbers}{ratio:>8.2f}  {judged}", flush=True)
        if subject != "cpu":
            name = result["name"].replace("cpu_ms_per_view", "ratio_to_cpu")
            yield {"name": name, "value": ratio, "unit": "times the CPU renderer", "chain": task.chain}
    cheaper = [subject for subject, result in results.items() if result["value"] < base]
    print(f"cheaper than the CPU renderer: {', '.join(cheaper) or 'none'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Parquet file with photographs (default: made-up ones)")
    parser.add_argument("--images", type=int, default=64, help="photographs of a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--chains", nargs="+", choices=list(CHAINS), default=list(CHAINS))
    parser.add_argument("--renderers", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--json", type=Path, help="write one JSON object a line, each as soon as it is measured")
    options = parser.parse_args()
    if "cpu" not in options.renderers:
        options.renderers.insert(0, "cpu")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    photographs = load_photographs(options.data, options.images)
    mean_kilobytes = sum(map(len, photographs.images)) / len(photographs.images) / 1000
    height, width = photographs.sizes.mean(axis=0)
    machine = describe_machine(
        "torch", "torchvision", "numpy", "opencv-python-headless", "simplejpeg", "pillow", "nvidia-dali-cuda130",
        "albumentations", "kornia",
    )  # fmt: skip
    data = f"{len(photographs.images)} {'photographs' if options.data else 'MADE-UP photographs (no --data was given)'}"
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{data}: {width:.0f} x {height:.0f} px and {mean_kilobytes:.0f} kB on average")
    renderers = []
    for subject in options.renderers:
        if reason := reason_against(subject):
            print(f"not measured: {subject}: {reason}")
        else:
            renderers.append(subject)
    context = machine | {"data": options.data.name if options.data else "made-up"}
    with open_results(options.json, context) as keep:
        for chain in options.chains:
            task = Task(chain=chain, views=get_recipe(CHAINS[chain]).views, photographs=photographs)
            renders = {subject: SUBJECTS[subject](task) for subject in renderers}
            seconds = measure_by_turns(renders, options.repeats)
            results = {subject: results_of(task, subject, seconds[subject], options.repeats) for subject in renderers}
            keep(results.values())
            keep(print_table(task, results))
            parts = list(render_parts.measure(chain, task.views, photographs, options.repeats, options.data))
            keep(parts)
            print("parts of the CPU renderer: " + ", ".join(f"{part['part']} {part['value']:.3f}" for part in parts))
        if reason_against("dali-cpu") is None:
            views = get_recipe(CHAINS["simsiam"]).views
            parts = list(render_parts.measure_host_work(views, photographs, options.repeats, options.data))
            keep(parts)
            print("\nbefore DALI on a GPU, CPU us of the host per image (goal: 100 for all): ", end="")
            print(", ".join(f"{part['part']} {part['value']:.1f}" for part in parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
