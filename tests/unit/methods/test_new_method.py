"""The seam: BYOL in one file outside the package, against lightly's loss, and trained like the others."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity

from hvp_ray.config import config_from_dict, config_to_dict
from hvp_ray.errors import ConfigError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.methods.method import ViewTensors, build_method
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import Candidates

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


def test_loss_of_the_example_equals_lightlys_and_its_score() -> None:
    method = build_method(get_recipe("byol:byol_digits").method).eval()
    slots = torch.randn(2, 7, 3, 8, 8)
    with torch.no_grad():
        for parameter in method.target_projector.parameters():
            parameter.add_(0.1)
        p1, p2 = (method.predictor(method.projector(method.backbone(slot))) for slot in slots)
        z1, z2 = (method.target_projector(method.target_backbone(slot)) for slot in slots)
    criterion = NegativeCosineSimilarity()
    expected = 0.5 * (criterion(p1, z2) + criterion(p2, z1))
    views = ViewTensors(global_views=slots)
    torch.testing.assert_close(method(views).loss.detach(), expected)
    torch.testing.assert_close(method.score(views, Candidates(num_views=2)).pairs_BP.mean().detach(), expected)


def test_example_trains_with_hard_views_and_its_target_follows(tmp_path: Path) -> None:
    recipe = get_recipe("byol:byol_digits")
    config = dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, output=str(tmp_path), name="byol"),
        data=dataclasses.replace(recipe.data, num_images=200),
        training=dataclasses.replace(recipe.training, epochs=2, images_per_step=16),
        tracking=dataclasses.replace(recipe.tracking, uri="none", num_figure_images=2, knn_images=40),
    )
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    summary = pretrain_in_process(config)
    assert summary is not None
    assert summary["method"] == "byol"
    assert summary["num_steps"] == 20
    assert summary["chosen_iou_mean"] is not None
    assert summary["knn_top1"] > summary["knn_top1_untrained"]


def test_page_includes_the_file() -> None:
    page = (EXAMPLES.parent / "new_method.md").read_text()
    assert '\n--8<-- "docs/examples/byol.py"\n' in page


def test_what_is_no_recipe_or_no_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        get_recipe("byol:nothing")
    for name in ("byol:ByolConfig", "byol:Byol", "time:time"):
        with pytest.raises(ConfigError, match="gives a RunConfig"):
            get_recipe(name)
    with pytest.raises(ConfigError, match="cannot be imported"):
        get_recipe(":x")
    nested = config_to_dict(get_recipe("simsiam-digits"))
    nested["method"]["type"] = "os:system"
    with pytest.raises(ConfigError, match="no MethodConfig"):
        config_from_dict(nested)
    del nested["method"]["type"]
    with pytest.raises(ConfigError, match="cannot be imported"):
        config_from_dict(nested)
