"""A run on damaged images: it ends well if it can, and at once with a file and a reason if it cannot."""

import json
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.config import RunConfig
from hvp_ray.errors import DataError
from hvp_ray.training.local import pretrain_in_process
from tests.helpers import encode, photograph_like, tiny_config


def _config(tmp_path: Path, *, num_images: int, damaged: range) -> RunConfig:
    """A run on a folder of images in two classes, of which a fifth is held out."""
    generator = np.random.default_rng(0)
    for index in range(num_images):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image" if index in damaged else encode(photograph_like(generator, 12, 12)))
    return tiny_config(
        str(tmp_path / "runs"),
        run={"name": "damaged"},
        data={"source": str(tmp_path / "images"), "num_images": None, "max_unreadable_fraction": 0.2},
        training={"epochs": 2, "images_per_step": 32},
        tracking={"num_figure_images": 4},
    )


def test_damaged_image_in_a_small_set_does_not_end_the_run(tmp_path: Path) -> None:
    """Every batch, of training and of the figure, has all 32 training images: no other one can replace the damaged ones."""
    config = _config(tmp_path, num_images=40, damaged=range(2, 6))
    summary = pretrain_in_process(config)
    assert summary is not None
    assert summary["num_unreadable_images"] >= 1
    assert summary["knn_top1"] is not None
    folder = tmp_path / "runs" / "damaged"
    assert (folder / "figures" / "candidate_views.png").exists()
    assert json.loads((folder / "summary.json").read_text())["weights_digest"] == summary["weights_digest"]


def test_run_without_a_readable_image_ends_with_a_file_and_a_reason(tmp_path: Path) -> None:
    config = _config(tmp_path, num_images=100, damaged=range(100))
    with pytest.raises(DataError, match=r"no readable image.*/images/class\d/\d+\.png: not an image"):
        pretrain_in_process(config)
