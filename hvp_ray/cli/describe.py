"""Print what a run needs, without starting it: settings, data, views, view workers, link, operations, memory.

hvp-ray describe [RECIPE] [--arm ARM] [--demand IMAGES_PER_SECOND] [--link GIGABYTES_PER_SECOND] [--section.field VALUE ...]

--demand: images per second that all trainers together take (default 1,000). --link: network into the node of one trainer;
with it, the program recommends what to ship.
"""

from dataclasses import dataclass
from typing import Any

from hvp_ray.cli.command_line import ArmOptions, exit_status, parse_run_options, say
from hvp_ray.config import RunConfig, config_to_dict, flatten
from hvp_ray.config.checks import Positive
from hvp_ray.errors import DataError
from hvp_ray.resolved_run import renderer_of

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


@dataclass(frozen=True, kw_only=True)
class Options(ArmOptions):
    """Options of a description."""

    demand: Positive = 1000.0
    """Images/s that the trainers shall get."""

    link: Positive | None = None
    """GB/s of the network to a trainer's node. None: not considered."""


def describe_settings(config: RunConfig) -> str:
    """Return all settings, one per line."""
    values = flatten(config_to_dict(config))
    width = max(map(len, values))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items())


def describe_data(config: RunConfig) -> str:
    """Return what the sources hold, and what is left out."""
    from hvp_ray.data.dataset import open_dataset
    from hvp_ray.data.inventory import take_inventory

    try:
        inventory = take_inventory(open_dataset(config.data), config.data)
    except (DataError, OSError) as error:
        return f"  {error}"
    return "\n".join(f"  {line}" for line in inventory.lines())


def describe_views(config: RunConfig) -> str:
    """Return what is rendered for a step."""
    from hvp_ray.costs.prefetch import batch_bytes
    from hvp_ray.selection import RULES, hard_step

    candidates = hard_step(config.selection).candidates(config.views)
    per_image = batch_bytes(config) / config.images_per_rank
    rule = RULES[config.selection.rule]
    trained, trained_locals = rule.num_trained_views(candidates)
    choice = f"chosen among {candidates.count:,} candidates"
    if rule.trains_on_all_views:
        choice = "all of them, in all pairs"
    elif rule.chooses_before_rendering:
        choice = f"chosen among the pairs of {config.selection.num_plans} plans before rendering"
    lines = [
        f"  per image      {candidates.num_views} global views of {config.views.global_views.size_px} px"
        + (
            f" and {candidates.num_local_views} local views of {config.views.local_views.size_px} px"
            if config.views.local_views is not None
            else ""
        ),
        f"  trained on     {trained} global views"
        + (f" and {trained_locals} local views" if trained_locals else "")
        + f", {choice}"
        + (f", of which {config.selection.limit} are compared" if config.selection.limit else ""),
        f"  bytes          {per_image / 1024:.0f} KiB an image, {batch_bytes(config) / _MIB:.1f} MiB a batch of one trainer",
    ]
    return "\n".join(lines)


def describe_pool(config: RunConfig, demand: float, link: float | None) -> str:
    """Render a sample on this machine; return what the demand needs if views or decoded pixels are shipped.

    Args:
        config: the run.
        demand: images per second of all trainers.
        link: bytes per second into the node of a trainer. None: unknown.
    """
    from hvp_ray.costs.pool_size import size_pool
    from hvp_ray.costs.service_times import measure_service_times

    images, what, remarks = _sample(config)
    times = measure_service_times(config, images)
    sizes = [size_pool(config, times, images_per_second=demand, ship="views")]
    is_measured = renderer_of(config.cluster) == "cpu"
    if is_measured:
        sizes.append(size_pool(config, times, images_per_second=demand, ship="pixels"))
    lines = [
        f"  measured on    {what}, {times.encoded_bytes / 1e3:.0f} kB encoded; renderer cpu, one thread of this machine",
        *(f"  intensities    {remark}" for remark in remarks),
        f"  demand         {demand:,.0f} images/s of {config.cluster.num_trainers} trainer(s); capacity 1.2 times that",
        "                 (set by --demand; a run prints what its trainers take)",
        "",
        f"  {'cluster.ship':<14}{'kB shipped':>11}{'CPU ms at':>11}{'CPU ms beside':>15}{'view':>9}{'finishers':>11}"
        f"{'GB/s into':>11}{'in':>8}{'store':>9}",
        f"  {'':<14}{'an image':>11}{'a worker':>11}{'the trainer':>15}{'workers':>9}{'a trainer':>11}"
        f"{'a trainer':>11}{'flight':>8}{'MiB':>9}",
    ]
    for size in sizes:
        shipped, at_worker, beside = times.view_bytes, times.whole_seconds, 0.0
        if size.ship == "pixels":
            shipped, at_worker, beside = times.shipped_pixel_bytes, times.decode_seconds, times.finish_seconds
        lines.append(
            f"  {size.ship:<14}{shipped / 1e3:>11.0f}{at_worker * 1e3:>11.2f}{beside * 1e3:>15.2f}{size.num_view_workers:>9}"
            f"{size.finishers_per_trainer:>11}{size.link_bytes_per_second / 1e9:>11.2f}{size.batches_in_flight:>8}"
            f"{size.store_bytes / _MIB:>9.0f}"
        )
    lines.append("")
    if config.selection.every > 1:
        lines.append(
            f"  of hard steps  every {config.selection.every}th step is hard; the others render and ship what they train on"
        )
    if not is_measured:
        lines.append(f"  not measured   {config.cluster.renderer}: the figures are those of renderer cpu")
    per_trainer = demand / config.cluster.num_trainers
    lines.append(
        "  link           give --link GIGABYTES_PER_SECOND into a trainer's node to learn what to ship over it"
        if link is None
        else _describe_link(sizes, link, per_trainer, per_trainer * times.encoded_bytes)
    )
    return "\n".join(lines)


def _describe_link(sizes: list[Any], link: float, demand: float, encoded_bytes_per_second: float) -> str:
    """Return what to ship over a link into the node of a trainer that takes `demand` images per second."""
    from hvp_ray.costs.pool_size import USABLE_LINK_FRACTION, recommend_ship

    chosen = recommend_ship(sizes, link)
    if chosen is None:
        least = min(sizes, key=lambda size: size.link_bytes_per_second)
        most = demand * USABLE_LINK_FRACTION * link / least.link_bytes_per_second
        return (
            f"  WARNING        neither fits {USABLE_LINK_FRACTION:.0%} of a link of {link / 1e9:g} GB/s: at most {most:,.0f} "
            f"images/s reach a trainer ({least.ship}).\n                 Put view workers on the trainers' nodes: then only "
            f"encoded images cross the link ({encoded_bytes_per_second / 1e9:.2f} GB/s)"
        )
    why = "views fit the link" if chosen == "views" else "views do not fit the link, decoded pixels do"
    finishers = next(size.finishers_per_trainer for size in sizes if size.ship == chosen)
    options = f" --cluster.finishers_per_trainer {finishers}" if chosen == "pixels" else ""
    return f"  recommended    --cluster.ship {chosen}{options}   ({why}: {link / 1e9:g} GB/s)"


def describe_step(config: RunConfig) -> str:
    """Return operations and memory of a step on one trainer."""
    from hvp_ray.costs.memory import estimate_memory
    from hvp_ray.costs.operations import count_operations, operations_of_step
    from hvp_ray.selection import RULES, hard_step

    operations, memory, every = count_operations(config), estimate_memory(config), config.selection.every
    if RULES[config.selection.rule].trains_on_all_views:
        ratio = operations_of_step(config, hard_step(config.selection)) / operations.random_step
        costs = [f"  on all pairs   {ratio:.2f} random steps"]
    else:
        costs = [
            f"  scoring        {operations.scoring / 1e12:.3g} TFLOP",
            f"  hard step      {operations.ratio:.2f} random steps"
            + (f"; every {every}th step is hard" if every > 1 else "")
            + ("; this run has none" if config.selection.rule == "first" else ""),
        ]
    return "\n".join(
        [
            f"operations of a step on one trainer ({config.images_per_rank} images)",
            f"  random views   {operations.random_step / 1e12:.3g} TFLOP",
            *costs,
            "",
            "memory of one trainer, MiB, without torch itself and its kernels' workspaces",
            *(f"  {title:<32} {getattr(memory, name) / _MIB:>9.0f}" for name, title in _NAMES.items()),
            "  (training.accumulation_steps makes it smaller, and training.activation_checkpointing that of a ViT)",
        ]
    )


def _sample(config: RunConfig) -> tuple[list[bytes], str, list[str]]:
    """Return images of the run's source, what they are, and remarks. Made-up images replace a source that cannot be opened.

    Raises:
        ConfigError: the images have more than 8 bits a channel, and `data.intensity_range` is not set.
    """
    from hvp_ray.data.dataset import open_dataset
    from hvp_ray.runs.intensity_check import check_intensities
    from hvp_ray.stream.reading import read_sample

    try:
        dataset = open_dataset(config.data)
        remarks = check_intensities(config.data, dataset)
        images = list(read_sample(dataset.source, dataset.training_ids))
        return images, f"{len(images)} images of {config.data.source}", remarks
    except (DataError, OSError) as error:
        why = str(error).splitlines()[0]
    if config.data.channels != 3:
        return [_made_up_array(config.data.channels)] * 8, f"a made-up image of 500 x 375 px ({why})", []
    return [_made_up_photograph()] * 8, f"a made-up photograph of 500 x 375 px ({why})", []


def _made_up_array(channels: int) -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(0).integers(0, 256, (375, 500, channels), np.uint8))
    return buffer.getvalue()


def _made_up_photograph() -> bytes:
    import io

    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:375, 0:500]
    pixels = np.stack([rows // 2, columns // 2, (rows * columns) % 251], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def describe(options: Options) -> None:
    """Print each part as soon as it is known.

    Raises:
        HvpRayError: the message tells the user what to do.
    """
    config = options.configured()
    say(f"settings of {config.recipe}\n{describe_settings(config)}\n")
    say(f"data\n{describe_data(config)}\n\nviews\n{describe_views(config)}\n")
    link = None if options.link is None else options.link * 1e9
    say(f"view workers\n{describe_pool(config, options.demand, link)}\n")
    say(describe_step(config))


def main(arguments: list[str]) -> int:
    """Print; return the exit status."""
    return exit_status(
        lambda: describe(parse_run_options(Options, arguments, program="hvp-ray describe", description=__doc__ or ""))
    )
