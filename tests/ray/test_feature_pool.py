"""Features of Ray tasks equal those of this process, and a task's error keeps its type."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.config import BackboneConfig, DataConfig
from hvp_ray.errors import ConfigError
from hvp_ray.evaluation import feature_pool
from hvp_ray.evaluation.feature_pool import FeatureRequest, Workers, pool_features
from hvp_ray.methods.backbones import build_backbone, export_backbone
from tests.helpers import views_config


@pytest.mark.ray
def test_tasks_give_the_features_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    config = BackboneConfig(name="resnet10", stem="cifar", channels=(4, 4, 8, 8))
    export_backbone(build_backbone(config), config, tmp_path / "backbone.safetensors")
    asked = FeatureRequest(
        backbone_path=tmp_path / "backbone.safetensors",
        data=DataConfig(source="digits"),
        views=views_config(8),
        part="training",
        sample_ids=np.arange(50),
    )
    monkeypatch.setattr(feature_pool, "IMAGES_PER_TASK", 16)
    with monkeypatch.context() as without_ray:
        without_ray.setattr(feature_pool.ray, "is_initialized", lambda: False)
        expected = pool_features(asked)
    request.getfixturevalue("ray_session")
    seen: list[int] = []
    found = pool_features(asked, Workers(num_workers=2), report_progress=lambda done, total: seen.append(done))
    assert np.array_equal(found.sample_ids, expected.sample_ids)
    assert np.allclose(found.features, expected.features, atol=1e-5)
    assert len(seen) == 4
    assert seen == sorted(seen)
    assert seen[-1] == 50
    with pytest.raises(ConfigError, match="last_blocks=2"):
        pool_features(dataclasses.replace(asked, last_blocks=2), Workers(num_workers=2))
