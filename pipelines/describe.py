"""Say what a run would be and need, without starting anything: settings, views, operations, memory, view workers.

python pipelines/describe.py [RECIPE] [--section.field VALUE ...]
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

from hvp_ray.config import RunConfig, ViewGroupConfig, config_to_dict, flatten
from hvp_ray.errors import HvpRayError
from pipelines.command_line import parse_run

_MIB = 2**20
_NAMES = {
    "weights": "weights (a teacher's included)",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "batch": "candidate views of a batch",
    "scoring_peak": "scoring pass, peak",
    "training_peak": "forward, backward, update, peak",
    "peak": "PEAK",
}


def describe_settings(config: RunConfig) -> str:
    """Return every setting, a line each."""
    values = flatten(config_to_dict(config))
    width = max(map(len, values))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items())


def describe_views(config: RunConfig) -> str:
    """Return what is rendered and shipped for a step, and the link that 1,000 images a second need."""
    from hvp_ray.stream.capacity import batch_bytes, look_ahead_bytes
    from hvp_ray.training.choosing import candidates_of

    candidates = candidates_of(config, 0)
    per_image = batch_bytes(config) / config.images_per_rank
    everything = config.selection.rule == "all_pairs"
    chosen = candidates.num_views if everything else 2
    chosen_locals = candidates.num_local_views if everything else candidates.num_chosen_local_views
    lines = [
        f"  per image      {candidates.num_views} global views of {config.views.global_views.size_px} px"
        + (
            f" and {candidates.num_local_views} local views of {config.views.local_views.size_px} px"
            if config.views.local_views is not None
            else ""
        ),
        f"  trained on     {chosen} global views"
        + (f" and {chosen_locals} local views" if chosen_locals else "")
        + f", chosen among {candidates.count:,} candidates"
        + (f", of which {config.selection.limit} are compared" if config.selection.limit else ""),
        f"  bytes          {per_image / 1024:.0f} KiB an image, {batch_bytes(config) / _MIB:.1f} MiB a batch of one trainer, "
        f"{look_ahead_bytes(config) / _MIB:.0f} MiB of look-ahead in the object store",
        f"  link           {per_image * 1000 / 1e9:.2f} GB/s into the trainers for every 1,000 images/s",
    ]
    return "\n".join(lines)


def describe_workers(config: RunConfig) -> str:
    """Render an imaginary photograph of 500 x 375 px here and now, and say how many workers that makes."""
    import io

    import numpy as np
    from PIL import Image

    from hvp_ray.randomness import Purpose
    from hvp_ray.records import ViewPlan
    from hvp_ray.views.plan import draw_plan
    from hvp_ray.views.render_cpu import CpuRenderer

    rows, columns = np.mgrid[0:375, 0:500]
    pixels = np.stack([rows // 2, columns // 2, (rows * columns) % 251], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    images, selection = [buffer.getvalue()] * 8, config.selection
    ids, heights, widths = np.arange(8), np.full(8, 375, np.int32), np.full(8, 500, np.int32)

    def plan(purpose: Purpose, num_views: int, group: ViewGroupConfig) -> ViewPlan:
        return draw_plan(
            seed=0, purpose=purpose, epoch=0, sample_ids=ids, heights=heights, widths=widths, num_views=num_views, group=group
        )  # fmt: skip

    global_plan = plan(Purpose.GLOBAL_VIEWS, selection.num_views_at(0), config.views.global_views)
    local_plan = None
    if config.views.local_views is not None:
        local_plan = plan(Purpose.LOCAL_VIEWS, selection.num_local_views_at(0), config.views.local_views)
    renderer = CpuRenderer(config.views, max_image_pixels=config.data.max_image_pixels)
    started, rounds = time.process_time(), 0
    while time.process_time() - started < 1.0:
        renderer.render(images, global_plan, local_plan)
        rounds += 1
    milliseconds = (time.process_time() - started) * 1000 / (rounds * len(images))
    return (
        f"  cpu renderer   {milliseconds:.1f} CPU ms an image on this machine (a JPEG of 500 x 375 px), so "
        f"{milliseconds:.0f} view workers for every 1,000 images/s"
    )


def main(arguments: list[str]) -> int:
    """Print; return the exit status."""
    try:
        config = parse_run(arguments, program="describe.py", description=__doc__ or "")
        print(
            f"settings of {config.recipe}\n{describe_settings(config)}\n\nviews\n{describe_views(config)}", flush=True
        )
        print(describe_workers(config), flush=True)
        from hvp_ray.training.memory import estimate_memory
        from hvp_ray.training.operations import count_operations

        operations = count_operations(config)
        print(
            f"\noperations of a step on one trainer ({config.images_per_rank} images)\n"
            f"  random views   {operations.random_step / 1e12:.3g} TFLOP\n"
            f"  scoring        {operations.scoring / 1e12:.3g} TFLOP\n"
            f"  hard step      {operations.ratio:.2f} random steps"
            + (f"; every {config.selection.every}th step is hard" if config.selection.every > 1 else ""),
            flush=True,
        )
        memory = estimate_memory(config)
        print("\nmemory of one trainer, MiB, without torch itself and its kernels' workspaces")
        for name, title in _NAMES.items():
            print(f"  {title:<32} {getattr(memory, name) / _MIB:>9.0f}")
        print("  (training.accumulation_steps makes it smaller)")
    except HvpRayError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
