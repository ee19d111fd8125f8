"""A run on damaged images: it ends well if it can, and at once with a file and a reason if it cannot."""

import json
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.config import RunConfig, config_to_dict
from hvp_ray.errors import CheckpointError, DataError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.records import BatchRequest
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.stream.render_batch import open_render_context, render_batch
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


def test_image_that_goes_away_is_damaged_and_a_resume_says_how_many_there_were(tmp_path: Path) -> None:
    """The file goes after the data was opened. Processes that open it later refuse it: ids would name other images."""
    config = _config(tmp_path, num_images=50, damaged=range(0))
    job = prepare_run(config, resolve_inline(config.cluster))
    context = open_render_context(config_to_dict(config), "cpu", job.data_fingerprint)
    place = context.source.describe(int(context.training_ids[0]))
    Path(place).unlink()
    request = BatchRequest(step=0, epoch=0, first_position=0, sample_ids=context.training_ids[:8], num_views=2)
    (replacement,) = render_batch(context, request).replacements
    assert replacement.place == place
    assert "gone" in replacement.reason
    with pytest.raises(DataError, match="has changed since the run was started: it has 49 images now"):
        open_render_context(config_to_dict(config), "cpu", job.data_fingerprint)
    with pytest.raises(
        CheckpointError, match=r"(?s)training source: '50 images' -> '49 images'.*restore missing files"
    ):
        prepare_run(config, resolve_inline(config.cluster))
