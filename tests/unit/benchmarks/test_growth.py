"""The slope that `make soak` judges memory by."""

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soaking.growth import MB, Sample, draw, growth_mb_per_1000_steps, thin_out, write_csv


def _samples(steps: list[int], memory: list[float]) -> list[Sample]:
    return [
        Sample(step=step, seconds=0.01 * step, rss_bytes={"trainer": int(mb * MB)})
        for step, mb in zip(steps, memory, strict=True)
    ]


def test_slope_of_a_line_is_its_slope_and_the_start_does_not_count() -> None:
    steps = list(range(0, 10_000, 50))
    memory = [500.0 + 3.0 * step / 1000 + (40.0 if step < 2000 else 0.0) for step in steps]
    assert growth_mb_per_1000_steps(_samples(steps, memory), "trainer", from_step=2000) == pytest.approx(3.0)
    assert growth_mb_per_1000_steps(_samples(steps, memory), "trainer", from_step=0) < 2.0


def test_slope_is_that_of_numpy_on_noise(generator: np.random.Generator) -> None:
    steps = sorted(generator.integers(0, 9_000, 60).tolist())
    memory = generator.normal(300, 5, 60).tolist()
    slope = growth_mb_per_1000_steps(_samples(steps, memory), "trainer", from_step=0)
    assert slope == pytest.approx(np.polyfit(steps, memory, 1)[0] * 1000, rel=1e-4, abs=1e-6)


def test_too_few_samples_have_no_slope() -> None:
    samples = _samples([1, 1, 1], [3.0, 4.0, 5.0])
    assert growth_mb_per_1000_steps(samples, "trainer", from_step=0) is None
    assert growth_mb_per_1000_steps(samples, "raylet", from_step=0) is None


def test_csv_has_a_row_a_sample_and_the_plot_is_drawn(tmp_path: Path) -> None:
    samples = _samples(list(range(1000)), [300.0 + i / 100 for i in range(1000)])
    thin = thin_out(samples, num_kept=20)
    assert [thin[0].step, thin[-1].step, len(thin)] == [0, 999, 20]
    write_csv(tmp_path / "memory.csv", thin, ["trainer", "GCS"])
    rows = list(csv.reader((tmp_path / "memory.csv").open()))
    assert rows[0] == ["step", "seconds", "trainer_mb", "GCS_mb"]
    assert rows[-1] == ["999", "10.0", "309.99", ""]
    draw(tmp_path / "memory.png", samples, ["trainer", "GCS"], from_step=200, bound_mb=1.0)
    assert (tmp_path / "memory.png").stat().st_size > 10_000
