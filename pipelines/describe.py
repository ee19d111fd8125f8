"""Say what a run would be and need, without starting anything: settings, views, view workers, link, operations, memory.

python pipelines/describe.py [RECIPE] [--demand IMAGES_PER_SECOND] [--link GIGABYTES_PER_SECOND] [--section.field VALUE ...]

--demand: images per second that all trainers together take (default 1,000). --link: of the network into the node of one
trainer; with it, what to ship over it is recommended.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

from hvp_ray.config import RunConfig, config_to_dict, flatten
from hvp_ray.errors import ConfigError, HvpRayError
from pipelines.command_line import parse_run

_MIB = 2**20
_NAMES = {
    "weights": "weights (a teacher's included)",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "batches": "candidate views of two batches",
    "scoring_peak": "scoring pass, peak",
    "training_peak": "forward, backward, update, peak",
    "peak": "PEAK",
}


def describe_settings(config: RunConfig) -> str:
    """Return every setting, a line each."""
    values = flatten(config_to_dict(config))
    width = max(map(len, values))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items())


def describe_data(config: RunConfig) -> str:
    """Return what the sources hold and what is left out of them."""
    from hvp_ray.data.dataset import open_dataset
    from hvp_ray.data.inventory import take_inventory
    from hvp_ray.errors import DataError

    try:
        inventory = take_inventory(open_dataset(config.data), config.data)
    except (DataError, OSError) as error:
        return f"  {error}"
    return "\n".join(f"  {line}" for line in inventory.lines())


def describe_views(config: RunConfig) -> str:
    """Return what is rendered for a step."""
    from hvp_ray.selection import RULES, candidates_of
    from hvp_ray.stream.capacity import batch_bytes

    candidates = candidates_of(config.selection, config.views, 0)
    per_image = batch_bytes(config) / config.images_per_rank
    chosen, chosen_locals = RULES[config.selection.rule].num_trained_views(candidates)
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
        f"  bytes          {per_image / 1024:.0f} KiB an image, {batch_bytes(config) / _MIB:.1f} MiB a batch of one trainer",
    ]
    return "\n".join(lines)


def describe_pool(config: RunConfig, demand: float, link: float | None) -> str:
    """Render a sample here and now; return what the demand takes, with views and with decoded pixels shipped.

    Args:
        config: the run.
        demand: images per second of all trainers.
        link: bytes per second into the node of a trainer; None: unknown.
    """
    from hvp_ray.stream.sizing import USABLE_LINK_FRACTION, measure_service_times, recommend_ship, size_pool

    images, what, remark = _sample(config)
    times = measure_service_times(config, images)
    trainers, per_trainer = config.cluster.num_trainers, demand / config.cluster.num_trainers
    needs = [size_pool(config, times, images_per_second=demand, ship="views")]
    if config.cluster.renderer in ("auto", "cpu"):
        needs.append(size_pool(config, times, images_per_second=demand, ship="pixels"))
    lines = [
        f"  measured on    {what}, {times.encoded_bytes / 1e3:.0f} kB encoded; renderer cpu, one thread of this machine",
        *([] if remark is None else [f"  intensities    {remark}"]),
        f"  demand         {demand:,.0f} images/s of {trainers} trainer(s); capacity 1.2 times that",
        "",
        f"  {'cluster.ship':<14}{'kB shipped':>11}{'CPU ms at':>11}{'CPU ms beside':>15}{'view':>9}{'finishers':>11}"
        f"{'GB/s into':>11}{'in':>8}{'store':>9}",
        f"  {'':<14}{'an image':>11}{'a worker':>11}{'the trainer':>15}{'workers':>9}{'a trainer':>11}"
        f"{'a trainer':>11}{'flight':>8}{'MiB':>9}",
    ]
    for need in needs:
        pixels = need.ship == "pixels"
        shipped = times.shipped_pixel_bytes if pixels else times.view_bytes
        at_worker, beside = (times.decode_seconds, times.finish_seconds) if pixels else (times.whole_seconds, 0.0)
        lines.append(
            f"  {need.ship:<14}{shipped / 1e3:>11.0f}{at_worker * 1e3:>11.2f}{beside * 1e3:>15.2f}{need.num_view_workers:>9}"
            f"{need.finishers_per_trainer:>11}{need.link_bytes_per_second / 1e9:>11.2f}{need.batches_in_flight:>8}"
            f"{need.store_bytes / _MIB:>9.0f}"
        )
    lines.append("")
    if config.selection.every > 1:
        lines.append(
            f"  of hard steps  every {config.selection.every}th step is one; the others render and ship what they train on"
        )
    if config.cluster.renderer not in ("auto", "cpu"):
        lines.append(f"  not measured   {config.cluster.renderer}: the figures are those of renderer cpu")
    if link is None:
        lines.append(
            "  tell the link into a trainer's node (--link GIGABYTES_PER_SECOND) to hear which of them fits it"
        )
        return "\n".join(lines)
    usable, chosen = USABLE_LINK_FRACTION * link, recommend_ship(needs, link)
    if chosen is None:
        least = min(needs, key=lambda need: need.link_bytes_per_second)
        most = per_trainer * usable / least.link_bytes_per_second
        lines.append(
            f"  WARNING        neither fits {USABLE_LINK_FRACTION:.0%} of a link of {link / 1e9:g} GB/s: at most {most:,.0f} "
            f"images/s reach a trainer ({least.ship}).\n                 Put view workers on the trainers' nodes: then only "
            f"encoded images cross the link ({per_trainer * times.encoded_bytes / 1e9:.2f} GB/s)"
        )
    else:
        why = "views fit the link" if chosen == "views" else "views do not fit the link, decoded pixels do"
        finishers = next(need.finishers_per_trainer for need in needs if need.ship == chosen)
        options = f" --cluster.finishers_per_trainer {finishers}" if chosen == "pixels" else ""
        lines.append(f"  recommended    --cluster.ship {chosen}{options}   ({why}: {link / 1e9:g} GB/s)")
    return "\n".join(lines)


def _sample(config: RunConfig) -> tuple[list[bytes], str, str | None]:
    """Return images of the run's source, what they are, and a remark; if it cannot be opened from here, made-up ones.

    Raises:
        ConfigError: the images have more than 8 bits a channel, and `data.intensity_range` is not set.
    """
    from hvp_ray.data.dataset import open_dataset
    from hvp_ray.errors import DataError
    from hvp_ray.runs.intensity_check import check_intensities
    from hvp_ray.stream.sizing import sample_images

    try:
        dataset = open_dataset(config.data)
        remark, images = check_intensities(config.data, dataset), sample_images(dataset)
        return images, f"{len(images)} images of {config.data.source}", remark
    except (DataError, OSError) as error:
        why = str(error).splitlines()[0]
    return [_made_up_photograph()] * 8, f"a made-up photograph of 500 x 375 px ({why})", None


def _made_up_photograph() -> bytes:
    import io

    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:375, 0:500]
    pixels = np.stack([rows // 2, columns // 2, (rows * columns) % 251], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _parse_own(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this program, and the rest: recipe and settings.

    Raises:
        ConfigError: not a positive number.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--demand", type=float, default=1000.0)
    parser.add_argument("--link", type=float)
    try:
        own, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; it must be a number") from error
    for name in ("demand", "link"):
        value = getattr(own, name)
        if value is not None and not 0.0 < value < float("inf"):
            raise ConfigError(f"--{name} {value:g} is not allowed: a positive number")
    return own, rest


def main(arguments: list[str]) -> int:
    """Print; return the exit status."""
    try:
        own, arguments = _parse_own(arguments)
        config = parse_run(arguments, program="describe.py", description=__doc__ or "")
        print(
            f"settings of {config.recipe}\n{describe_settings(config)}\n\ndata\n{describe_data(config)}\n\n"
            f"views\n{describe_views(config)}",
            flush=True,
        )
        link = None if own.link is None else own.link * 1e9
        print(f"\nview workers\n{describe_pool(config, own.demand, link)}", flush=True)
        from hvp_ray.costs.memory import estimate_memory
        from hvp_ray.costs.operations import count_operations

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
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
