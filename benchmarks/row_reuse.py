"""What a forward of N rows and a backward of M of them cost: with the chosen rows forwarded again, and with row reuse.

python benchmarks/row_reuse.py [--network NAME] [--rows N M] [--precision bfloat16] [--repeats N] [--json FILE]

random forwards and trains on M rows, as a step on random views does, and is the unit of the ratios. again forwards all rows
without gradient and then the chosen ones with gradient. reuse keeps what the backward of the chosen rows needs
(`hvp_ray.row_reuse`), and reuse-inputs keeps only the inputs of the network's blocks. gather is the part of reuse between
its forward and its backward. The ways with -compiled use torch.compile; random-compiled is the unit of their second ratio.

On a CPU the time is CPU time of one thread. The ways take turns, and the ratio is the median over turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

import timm
import torch
from torch import Tensor, nn

from benchmarks.results_file import describe_machine, open_results
from benchmarks.step import seconds_of
from hvp_ray.row_reuse import RowReuse

Way = Callable[[], object]


def ways_of(encoder: nn.Module, images: Tensor, chosen: Tensor, *, is_mixed: bool, compiled: bool) -> dict[str, Way]:
    """Return the ways to train on the chosen rows, by name; each ends with the gradients of one step."""
    forward = torch.compile(encoder) if compiled else encoder

    def with_autocast(way: Way) -> Way:
        def work() -> None:
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=is_mixed):  # casts anew in each step
                way()

        return work

    def train(outputs: Tensor) -> None:
        encoder.zero_grad()
        outputs.square().mean().backward()

    def again() -> None:
        with torch.no_grad():
            forward(images)
        train(forward(images[chosen]))

    def reusing(reuse: RowReuse) -> Way:
        return lambda: train(reuse.forward_all(images)[1].rows(chosen))

    suffix = "-compiled" if compiled else ""
    ways: dict[str, Way] = {
        "random": lambda: train(forward(images[chosen])),
        "again": again,
        "reuse": reusing(RowReuse(encoder, compiled=compiled)),
    }
    if not compiled:
        ways["reuse-inputs"] = reusing(RowReuse(encoder, keep_inputs_of=encoder.blocks))
    return {f"{name}{suffix}": with_autocast(way) for name, way in ways.items()}


def gather_seconds(encoder: nn.Module, images: Tensor, chosen: Tensor, repeats: int) -> list[float]:
    """Return the seconds between forward and backward of reuse."""
    reuse, seconds = RowReuse(encoder), []
    for _ in range(repeats):
        _, kept = reuse.forward_all(images)
        seconds.append(seconds_of(lambda kept=kept: kept.rows(chosen), images.device))
    return seconds


def main() -> int:
    """Measure, print and keep the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vit_small_patch16_224", help="a Vision Transformer of timm's")
    parser.add_argument("--rows", type=int, nargs=2, default=[16, 8], metavar=("N", "M"), help="forwarded, trained on")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = timm.create_model(options.network, num_classes=0).train().to(device)
    num_rows, num_chosen = options.rows
    images = torch.randn(num_rows, *encoder.pretrained_cfg["input_size"], device=device)
    chosen = torch.randperm(num_rows, device=device)[:num_chosen].sort().values
    is_mixed = options.precision == "bfloat16"
    ways = ways_of(encoder, images, chosen, is_mixed=is_mixed, compiled=False)
    ways |= ways_of(encoder, images, chosen, is_mixed=is_mixed, compiled=True)
    context = {"network": options.network, "rows": num_rows, "chosen": num_chosen, "precision": options.precision}
    machine = describe_machine("torch", "timm") | {"device": str(device)}
    print(", ".join(f"{name} {value}" for name, value in (context | machine).items()))
    with open_results(options.json, machine) as keep:
        first = {}
        for name, way in ways.items():
            start = time.monotonic()
            way()  # traces, compiles, allocates memory
            first[name] = time.monotonic() - start
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        names = list(ways)
        for turn in range(options.repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(seconds_of(ways[name], device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_mixed):
            seconds["gather"] = gather_seconds(encoder, images, chosen, options.repeats)
        print(f"{'way':<20}{'seconds':>10}{'first':>10}{'to random':>12}{'to random-compiled':>20}")
        for name, values in seconds.items():
            ratios = {
                unit: statistics.median(mine / of_unit for mine, of_unit in zip(values, seconds[unit], strict=True))
                for unit in ("random", "random-compiled")
            }
            row = {"name": f"row_reuse.{name}", "value": statistics.median(values), "unit": "s"} | context
            row |= {"first_seconds": first.get(name)} | {f"to_{unit}": ratio for unit, ratio in ratios.items()}
            keep([row])
            start_s = f"{first[name]:>10.1f}" if name in first else " " * 10
            print(
                f"{name:<20}{row['value']:>10.4f}{start_s}{ratios['random']:>12.3f}{ratios['random-compiled']:>20.3f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
