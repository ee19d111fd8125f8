"""What a trainer could do if views cost nothing: the same loop, fed from one cached batch.

python benchmarks/headroom.py [--step-seconds S] [--backbone NAME] [--images-per-step N] [--size-px N] [--json FILE]

By default the trainer really trains (SimSiam with 4 views, the product's loop and step, one CPU thread). With
--step-seconds its step is a timed wait, as in benchmarks/stream.py, which measures how near the stream comes to this bound.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

import cv2
import torch

from benchmarks.results_file import Results, describe_machine, open_results
from benchmarks.streams.setting import Setting, build_setting
from benchmarks.streams.timed_loop import LoopTimes, run_timed
from benchmarks.streams.training import CachedBatches, first_batch, training_headroom, with_small_network


def timed_headroom(setting: Setting, batches: CachedBatches, *, step_seconds: float, steps: int) -> LoopTimes:
    """Return the times of the timed loop on a cached batch."""
    return run_timed(
        batches.next_batch,
        steps=steps,
        step_seconds=step_seconds,
        images_per_step=setting.images_per_step,
        steps_per_epoch=setting.steps_per_epoch,
    )


def measure(options: argparse.Namespace, folder: Path) -> Results:
    setting = build_setting(
        data=options.data,
        folder=folder,
        images_per_step=options.images_per_step,
        size_px=options.size_px,
        steps_per_epoch=1,
        epochs=options.steps,
    )
    if options.step_seconds is not None:
        cached = CachedBatches(first_batch(setting.config))
        speed = timed_headroom(setting, cached, step_seconds=options.step_seconds, steps=options.steps)
        step = f"a wait of {options.step_seconds:g} s"
    else:
        speed = training_headroom(with_small_network(setting, options.backbone), options.steps)
        step = f"training SimSiam, {options.backbone}"
    print(f"headroom, {step}, {options.images_per_step} images of 4 views of {options.size_px} px a step: "
          f"{speed.images_per_second:.2f} images/s")  # fmt: skip
    yield {
        "name": "stream.headroom.images_per_second",
        "value": speed.images_per_second,
        "unit": "images/s",
        "step": step,
        "images_per_step": options.images_per_step,
        "size_px": options.size_px,
        "steps": options.steps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Parquet file with photographs (default: made-up ones)")
    parser.add_argument("--step-seconds", type=float, help="length of a timed step (default: really train)")
    parser.add_argument("--backbone", default="resnet10t", help="timm name")
    parser.add_argument("--images-per-step", type=int, default=32)
    parser.add_argument("--size-px", type=int, default=96, help="of a view")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    machine = describe_machine("torch", "numpy", "opencv-python-headless", "timm")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    context = machine | {"data": options.data.name if options.data else "made-up"}
    with tempfile.TemporaryDirectory(prefix="hvp-headroom-") as folder, open_results(options.json, context) as keep:
        keep(measure(options, Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
