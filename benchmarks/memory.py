"""Memory of a GPU that trains DINOv2, for networks from ViT-S to ViT-g on 1, 8 and 64 GPUs; and whether the count is right.

python benchmarks/memory.py table [--json FILE]      counted over an imaginary step; minutes, no GPU
python benchmarks/memory.py check [--json FILE]      counted beside measured: ViT-S/14 on this CPU, whole and in two shards

table: 32 images a GPU; 4 + 8 views of 224 and 98 px are scored by class token, 2 + 8 are trained on; bfloat16, activation
checkpointing, `cluster.sharding=fsdp` on more than one GPU. kept: weights, gradients and optimizer state.

check: the resident memory of a process in its second step, less that before the networks were built. Freed memory is given
back at once (MALLOC_MMAP_THRESHOLD_), so that the largest value is that of tensors in use.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)  # this checkout, wherever it is started from
os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by the processes that `check` starts

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.results_file import Result, Results, describe_machine, open_results
from hvp_ray.config import RunConfig, with_settings
from hvp_ray.costs.imaginary import made_up_batch
from hvp_ray.costs.memory import estimate_memory
from hvp_ray.distributed.world import World
from hvp_ray.methods.method import StepPosition
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import hard_step
from hvp_ray.training.step import train_step
from hvp_ray.training.trainee import build_trainee

NETWORKS = {
    "ViT-S/14": ("dinov2-imagenet-vits14", "vit_small_patch14_reg4_dinov2"),
    "ViT-B/14": ("dinov2-imagenet-vitl14", "vit_base_patch14_reg4_dinov2"),
    "ViT-L/14": ("dinov2-imagenet-vitl14", "vit_large_patch14_reg4_dinov2"),
    "ViT-g/14": ("dinov2-imagenet-vitl14", "vit_giant_patch14_reg4_dinov2"),
}
NUM_GPUS = (1, 8, 64)
IMAGES = 32
GIB = 2**30


def sharded(config: RunConfig, num_ranks: int, images: int) -> RunConfig:
    """Return the config with so many trainers and images of each."""
    return with_settings(
        config,
        {
            "cluster.num_trainers": num_ranks,
            "cluster.sharding": "none" if num_ranks == 1 else "fsdp",
            "training.images_per_step": images * num_ranks,
        },
    )


def table() -> Results:
    """Yield the counted memory of each network and number of GPUs; print it as a table."""
    print("| network | GPUs | kept, GiB | scoring, peak | training, peak |\n|---|---|---|---|---|", flush=True)
    for name, (recipe, network) in NETWORKS.items():
        settings = {
            "method.backbone.name": network,
            "method.scoring": "class",
            "training.activation_checkpointing": True,
        }
        for num_gpus in NUM_GPUS:
            estimate = estimate_memory(sharded(with_settings(get_recipe(recipe), settings), num_gpus, IMAGES))
            kept = estimate.weights + estimate.gradients + estimate.optimizer_state
            row = [kept, estimate.scoring_peak, estimate.training_peak]
            print(f"| {name} | {num_gpus} | " + " | ".join(f"{size / GIB:.1f}" for size in row) + " |", flush=True)
            context = {"network": name, "num_gpus": num_gpus, "unit": "bytes"}
            for part, size in zip(("kept", "scoring_peak", "training_peak"), row, strict=True):
                yield {"name": f"memory/{part}", "value": size, **context}


def check() -> Results:
    """Yield the measured over the counted memory of a step, in one process and in each of two."""
    recipe = get_recipe("dinov2-imagenet-vits14")
    settings: dict[str, Any] = {"training.precision": "float32", "training.torch_threads": 1}
    for num_ranks in (1, 2):
        config = sharded(with_settings(recipe, settings), num_ranks, images=4)
        estimate = estimate_memory(config)
        counted = estimate.peak - estimate.batches // 2  # no next batch is waiting
        with mp.Manager() as manager:
            found = manager.dict()
            mp.start_processes(measure, (num_ranks, config, found), nprocs=num_ranks, start_method="spawn")
            measured = max(found.values())
        ratio = measured / counted
        print(
            f"{num_ranks} process(es): counted {counted / GIB:.2f} GiB, measured {measured / GIB:.2f}, ratio {ratio:.2f}"
        )
        yield {"name": "memory/measured_over_counted", "value": ratio, "num_ranks": num_ranks, "unit": "ratio"}


def measure(rank: int, num_ranks: int, config: RunConfig, found: Any) -> None:
    """Put the peak of this rank's resident memory in its second step into `found`, less that before the networks."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = _resident("VmRSS")
    trainee = build_trainee(config, World(rank=rank, num_ranks=num_ranks), torch.device("cpu"), None)
    trainee.method.train()
    batch = made_up_batch(config.of_one_trainer(), lambda shape, dtype: torch.randint(0, 255, shape, dtype=dtype))
    for step in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        trainee.method.begin_step(
            StepPosition(step=9_997 + step, num_steps=10_000, steps_per_epoch=1)
        )  # all are trained
        train_step(trainee, batch, config, hard_step(config.selection))
    found[rank] = _resident("VmHWM") - before
    dist.destroy_process_group()


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def main() -> None:
    """Read the command line and do its part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["table", "check"])
    parser.add_argument("--json", type=Path, help="write one JSON line a number")
    options = parser.parse_args()
    context: Result = describe_machine("torch", "timm")
    with open_results(options.json, context) as keep:
        for result in table() if options.part == "table" else check():
            keep([result])


if __name__ == "__main__":
    main()
