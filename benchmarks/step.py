"""What a hard step costs in random steps, measured and by operation count, for every method.

python benchmarks/step.py [--recipes NAME ...] [--images N] [--repeats N] [--json FILE]

A random step trains on the views of the vanilla arm; a hard step scores all candidates first, at full resolution
(hardest-224) or at a lower one (hardest-112). Both are the real step on the real network with made-up pixels; rendering is
not part of it. On a CPU the time is CPU time of one thread, which other load on the machine distorts little; on a GPU it is
the device's own clock. The steps take turns, and medians are reported.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

import torch
from torch.utils.flop_counter import FlopCounterMode

from hvp_ray.config import RunConfig
from hvp_ray.distributed.world import World
from hvp_ray.methods import self_distillation as distillation
from hvp_ray.recipes import get_recipe
from hvp_ray.training.imaginary import made_up_batch
from hvp_ray.training.operations import count_operations
from hvp_ray.training.setup import build_trainee
from hvp_ray.training.step import train_step

RECIPES = (
    "simsiam-imagenet-r50-100ep",
    "simclr-imagenet-r50-100ep",
    "dino-imagenet-vits16-100ep",
    "ibot-imagenet-vits16-100ep",
)


def noise(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=dtype)


def settings_of(config: RunConfig) -> dict[str, RunConfig]:
    """The settings that are compared, by name."""

    def with_selection(**changes: object) -> RunConfig:
        return dataclasses.replace(config, selection=dataclasses.replace(config.selection, every=1, **changes))

    size_px = config.views.global_views.size_px
    return {
        "random": with_selection(rule="first", limit=None),
        f"hardest-{size_px}": with_selection(rule="hardest"),
        f"hardest-{size_px // 2}": with_selection(rule="hardest", scoring_resolution_px=size_px // 2),
    }


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(recipe: str, images: int, repeats: int, device: torch.device) -> list[dict[str, object]]:
    config = get_recipe(recipe)
    precision = config.training.precision if device.type == "cuda" else "float32"
    training = dataclasses.replace(config.training, images_per_step=images, precision=precision)
    config = dataclasses.replace(config, training=training)
    settings = settings_of(config)
    trainee = build_trainee(config, World(), device, None)
    trainee.method.train()
    steps = {}
    for name, setting in settings.items():
        batch = made_up_batch(setting, noise)
        local_pixels = None if batch.local_pixels is None else batch.local_pixels.to(device)
        on_device = dataclasses.replace(batch, global_pixels=batch.global_pixels.to(device), local_pixels=local_pixels)
        steps[name] = lambda batch=on_device, setting=setting: train_step(trainee, batch, setting)
    for step in steps.values():
        step()  # memory, kernels and the optimizer's state are made once
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    results = []
    prefix = f"step.{config.method.name}.{config.method.backbone.name}.{config.views.global_views.size_px}"
    context = {"recipe": recipe, "images": images, "repeats": repeats, "precision": precision}
    for name, setting in settings.items():
        model_ratio = 1.0 if name == "random" else count_operations(setting).ratio
        for quantity, value, unit in (
            ("seconds", median[name], "s"),
            ("ratio", median[name] / median["random"], "random steps"),
            ("model_ratio", model_ratio, "random steps"),
        ):
            results.append({"name": f"{prefix}.{name}.{quantity}", "value": value, "unit": unit, **context})
    return results


def count_cross_entropies(repeats: int) -> list[dict[str, object]]:
    """DINO's scoring of 4 + 16 views: how many cross-entropies over 65,536 prototypes, and what they cost.

    Beside it the reference's way: the 18 terms of each of 128 candidates, here of 4 of them, times 32.
    """
    prototypes, images = 65_536, 2
    targets = torch.softmax(torch.randn(4, images, prototypes), dim=-1)
    logits = torch.randn(20, images, prototypes)
    with FlopCounterMode(display=False) as counter:
        distillation.cross_entropies(targets, logits, 0.1)
    products = counter.get_total_flops() / (2 * prototypes * images)

    def naive() -> None:
        for first in range(4):
            for view in range(9):
                for teacher_view in (first, (first + 1) % 4):
                    log_probabilities = torch.log_softmax(logits[view] / 0.1, dim=-1)
                    (targets[teacher_view] * log_probabilities).sum(dim=-1)

    cpu = torch.device("cpu")
    once = statistics.median(
        seconds_of(lambda: distillation.cross_entropies(targets, logits, 0.1), cpu) for _ in range(repeats + 2)
    )
    by_tuple = 32 * statistics.median(seconds_of(naive, cpu) for _ in range(repeats + 2))
    context = {"prototypes": prototypes, "images": images, "views": "4+16"}
    return [
        {"name": "scoring.dino.cross_entropies", "value": products - 4, "unit": "per image", **context},
        {"name": "scoring.dino.cross_entropies_of_128_candidates", "value": 128 * 18, "unit": "per image", **context},
        {"name": "scoring.dino.terms.seconds", "value": once, "unit": "s", **context},
        {"name": "scoring.dino.terms_of_128_candidates.seconds", "value": by_tuple, "unit": "s", **context},
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--images", type=int, default=4, help="images per step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{time.strftime('%Y-%m-%d')}, {device.type} ({hardware}), torch {torch.__version__}, {options.images} images a step"
    )
    print(f"{'setting':<52}{'seconds':>10}{'ratio':>8}{'model':>8}")
    results = []
    for recipe in options.recipes:
        measured = measure(recipe, options.images, options.repeats, device)
        results += measured
        for seconds, ratio, model in zip(measured[0::3], measured[1::3], measured[2::3], strict=True):
            name = str(seconds["name"]).removeprefix("step.").removesuffix(".seconds")
            print(f"{name:<52}{seconds['value']:>10.3f}{ratio['value']:>8.2f}{model['value']:>8.2f}", flush=True)
    terms = count_cross_entropies(options.repeats)
    results += terms
    for term in terms:
        print(f"{term['name']:<52}{term['value']:>10.4g} {term['unit']}")
    if options.json is not None:
        context = {"date": time.strftime("%Y-%m-%d"), "device": hardware, "torch": torch.__version__}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("".join(json.dumps(result | context) + "\n" for result in results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
