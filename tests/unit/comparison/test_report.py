"""The report's page: it holds all arms and figures, needs no other file, and escapes text."""

import dataclasses
from pathlib import Path

import pytest

from hvp_ray.comparison.arms import get_arm
from hvp_ray.comparison.report import render_report
from hvp_ray.comparison.results import RunResult, summarize_metric
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.comparison.study import Study
from tests.helpers import resolved_of, tiny_config

COST = StepCost(
    step_seconds=1.0,
    render_cpu_seconds=0.5,
    views_per_image=2.0,
    forwards_per_image=2.0,
    counted_operations=10.0,
    memory_bytes=3.0 * 2**20,
)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    base = tiny_config(str(tmp_path))
    return Study(
        name="c",
        location=str(tmp_path / "c"),
        base=base,
        resolved=resolved_of(base),
        arms=tuple(get_arm(name) for name in ("vanilla", "hardest", "vanilla-long")),
        seeds=(0, 7),
        budget="steps",
        accounting="measured",
        costs={"vanilla": COST, "hardest": dataclasses.replace(COST, step_seconds=1.5)},
        num_images=10 * base.training.images_per_step,
    )


def _page(study: Study, figures: list[Path], **summary: object) -> str:
    results = [
        RunResult(
            arm=run.arm.name,
            seed=run.seed,
            name=run.name,
            location=run.location,
            folder=Path(run.location),
            summary={"knn_top1": 0.5, "num_steps": run.num_steps, "weights_digest": 64 * "d"} | summary,
            curve=(),
        )
        for run in study.runs()
    ]
    return render_report(study, results, [summarize_metric(study, results, "knn_top1")], {}, figures)


def test_page_shows_all_runs_and_embeds_figures(study: Study, tmp_path: Path) -> None:
    figure = tmp_path / "result.png"
    figure.write_bytes(b"pixels")
    page = _page(study, [figure])
    assert all(f"<td>{run.name}</td><td>{run.num_steps}</td>" in page for run in study.runs())
    assert "<th>seed 0</th><th>seed 7</th>" in page
    assert "<td>hardest</td><td>20</td><td>1.500</td><td>1.50</td>" in page  # steps, seconds, random steps
    assert "<td>vanilla-long</td><td>30</td><td>1.000</td><td>1.00</td><td>1.00</td><td>1.50</td>" in page
    assert 'src="data:image/png;base64,cGl4ZWxz"' in page and "Every point is one run" in page
    assert "http" not in page
    assert "Embeddings collapsed" not in page


def test_rendering_is_per_image_of_each_arms_own_steps(study: Study) -> None:
    """By hand: 0.5 s per step of 16 images is 31.25 ms per image, and of the 8 images of all pairs of four views 62.5."""
    study = dataclasses.replace(
        study, arms=(*study.arms[:1], get_arm("all-pairs")), costs={"vanilla": COST, "all-pairs": COST}
    )
    page = _page(study, [])
    for images, milliseconds in ((16, "31.25"), (8, "62.50")):
        assert images in {run.config.training.images_per_step for run in study.runs()}
        assert f"<td>{milliseconds}</td>" in page


def test_page_escapes_text_and_warns(study: Study) -> None:
    page = _page(study, [], problems=["k-NN: <script>"], num_collapse_warnings=2)
    assert "k-NN: &lt;script&gt;" in page and "<script>" not in page
    assert "Embeddings collapsed in 6 run(s): c-vanilla-s0" in page
