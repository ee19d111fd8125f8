"""Memory of the processes of a run over its steps: the samples, how fast they grow, and their plot."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MB = 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look at all processes."""

    step: int
    """Steps done."""
    seconds: float
    """Since the run was started."""
    rss_bytes: dict[str, int]
    """Kind of process -> resident memory, the mean where there are several; only those that were there."""


def growth_mb_per_1000_steps(samples: list[Sample], kind: str, *, from_step: int) -> float | None:
    """Return the slope of the least-squares line through the memory of a kind of process, from a step on, in MB (10^6 bytes).

    None: fewer than two steps were sampled.
    """
    points = [(s.step, s.rss_bytes[kind]) for s in samples if s.step >= from_step and kind in s.rss_bytes]
    steps, memory = np.array(points, dtype=np.float64).reshape(-1, 2).T
    if len(set(steps.tolist())) < 2:
        return None
    centred = steps - steps.mean()
    return float((centred * (memory - memory.mean())).sum() / (centred**2).sum()) * 1000 / MB


def thin_out(samples: list[Sample], *, num_kept: int) -> list[Sample]:
    """Return at most `num_kept` samples, evenly, first and last included."""
    if len(samples) <= num_kept:
        return samples
    return [samples[i] for i in np.linspace(0, len(samples) - 1, num_kept).round().astype(int).tolist()]


def write_csv(path: Path, samples: list[Sample], kinds: list[str]) -> None:
    """Write one row a sample: step, seconds, and MB of each kind of process."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "seconds", *(f"{kind}_mb" for kind in kinds)])
        for sample in samples:
            memory = [f"{sample.rss_bytes[kind] / MB:.2f}" if kind in sample.rss_bytes else "" for kind in kinds]
            rows.writerow([sample.step, f"{sample.seconds:.1f}", *memory])


def draw(path: Path, samples: list[Sample], kinds: list[str], *, from_step: int, bound_mb: float) -> None:
    """Draw the memory of each kind of process, the line through it, and the steepest line that is allowed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, kind in zip(axes.flat, kinds, strict=False):
        seen = [s for s in samples if kind in s.rss_bytes]
        steps = np.array([s.step for s in seen])
        memory = np.array([s.rss_bytes[kind] for s in seen]) / MB
        axis.plot(steps, memory, color="#1f6f8b", linewidth=1.2)
        growth = growth_mb_per_1000_steps(samples, kind, from_step=from_step)
        late = steps >= from_step
        if growth is not None:
            x = np.array([from_step, steps.max()])
            middle = x - steps[late].mean()
            centre = memory[late].mean()
            axis.plot(x, centre + growth * middle / 1000, color="#c8553d", label=f"{growth:+.2f} MB per 1,000 steps")
            axis.plot(
                x, centre + bound_mb * middle / 1000, color="#999999", linestyle=":", label=f"bound: {bound_mb:g}"
            )
            axis.legend(loc="lower right", fontsize=8, framealpha=0.9, edgecolor="none")
            low, high = centre - 8 * bound_mb, centre + 8 * bound_mb
            axis.set_ylim(min(low, memory[late].min()), max(high, memory.max()))
        axis.set_title(kind, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("resident memory, MB")
    for axis in axes[-1]:
        axis.set_xlabel("steps done")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
