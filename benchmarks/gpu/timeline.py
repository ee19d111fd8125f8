"""The timeline of a trainer: copies of batches to the device against the device's work on the batches before."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.check import Check
from benchmarks.results_file import Results
from hvp_ray.config import RunConfig
from hvp_ray.selection import hard_step
from hvp_ray.stream.batches import BatchStream
from hvp_ray.training.step import train_step
from hvp_ray.training.trainee import Trainee

_SHOWN_STEPS = 6


@dataclass(frozen=True, slots=True)
class Span:
    """Work of the device from `start` to `end`, milliseconds."""

    start: float
    end: float


def draw(check: Check, trainee: Trainee, batches: BatchStream, config: RunConfig) -> Results:
    """Train on some batches of a stream under torch's profiler, draw what the device did, and measure the overlap."""
    if check.device != "cuda":
        return
    trainee.method.train()
    for _ in range(4):
        train_step(trainee, batches.next_batch(), config, hard_step(config.selection))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_SHOWN_STEPS):
            train_step(trainee, batches.next_batch(), config, hard_step(config.selection))
        torch.cuda.synchronize()
    copies, work, streams = _spans(profile)
    hidden = overlap(copies, work)
    total = sum(span.end - span.start for span in copies)
    yield {"name": "timeline.copies", "value": len(copies), "unit": "copies of 1 MB and more", "streams": streams}
    yield {"name": "timeline.copy_milliseconds", "value": total, "unit": "ms"}
    yield {"name": "timeline.copy_time_behind_work", "value": 100 * hidden / total if total else None, "unit": "%"}
    picture(copies, work, check.picture)


def _spans(profile: torch.profiler.profile) -> tuple[list[Span], list[Span], list[int]]:
    """Return the large copies to the device, all kernels, and the streams that the copies were on."""
    events = [e for e in profile.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    begin = min(event.start_ns() for event in events)

    def span(event: object) -> Span:
        return Span((event.start_ns() - begin) / 1e6, (event.start_ns() - begin + event.duration_ns()) / 1e6)

    is_copy = [event.name().startswith("Memcpy HtoD") for event in events]
    large = [e for e, copy in zip(events, is_copy, strict=True) if copy and e.duration_ns() > 50_000]
    kernels = [e for e in events if not e.name().startswith(("Memcpy", "Memset"))]
    streams = sorted({event.device_resource_id() for event in large})
    return [span(event) for event in large], [span(event) for event in kernels], streams


def overlap(copies: Sequence[Span], work: Sequence[Span]) -> float:
    """Return how many milliseconds of the copies lie behind work."""
    total = 0.0
    merged: list[Span] = []
    for span in sorted(work, key=lambda span: span.start):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    for copy in copies:
        total += sum(max(0.0, min(copy.end, span.end) - max(copy.start, span.start)) for span in merged)
    return total


def picture(copies: Sequence[Span], work: Sequence[Span], path: Path) -> None:
    """Draw two lanes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 2.2), layout="constrained")
    for lane, (spans, colour) in enumerate(((work, "tab:blue"), (copies, "tab:orange"))):
        axes.broken_barh(
            [(s.start, s.end - s.start) for s in spans], (lane - 0.35, 0.7), facecolors=colour, linewidth=0
        )
    axes.set_yticks([0, 1], ["kernels", "copies to\nthe device"])
    axes.set_xlabel("milliseconds")
    axes.set_title(
        f"{_SHOWN_STEPS} steps of a trainer: batches are copied while the device works on those before", fontsize=10
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
