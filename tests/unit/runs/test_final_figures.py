"""The figures at the end of a run, by its encoder."""

from pathlib import Path

import pytest

from hvp_ray.launch.local import pretrain_in_process
from tests.helpers import tiny_config


@pytest.mark.parametrize(("recipe", "has_maps"), [("ibot-digits", True), ("simsiam-digits", False)])
def test_run_with_a_vision_transformer_draws_its_attention(tmp_path: Path, recipe: str, has_maps: bool) -> None:
    config = tiny_config(
        str(tmp_path),
        recipe,
        run={"name": "r"},
        training={"num_steps": 2},
        tracking={"num_figure_images": 2, "knn_images": 0},
    )
    summary = pretrain_in_process(config)
    assert summary is not None
    assert summary["problems"] == []
    figures = {path.name for path in (tmp_path / "r" / "figures").iterdir()}
    assert figures >= {"candidate_views.png", "loss.png", "overlap.png"} and ("attention.png" in figures) == has_maps
