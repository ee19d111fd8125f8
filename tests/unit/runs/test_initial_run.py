"""A run that starts from all weights of another one, as for a last phase at a higher resolution."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from hvp_ray.config import RunConfig
from hvp_ray.distributed.world import World
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.runs.checkpoint import CheckpointStore, weights_digest
from hvp_ray.runs.initial_run import build_method_at_start, pin_initial_run
from hvp_ray.tracking.run_log import EVALUATIONS, read_records
from hvp_ray.training.trainee import Trainee, build_trainee_of
from tests.helpers import tiny_config
from tests.s3_server import s3_server
from tests.unit.data.made import upload


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pretrain_in_process(_config(folder, "first"))
    return folder


def _config(folder: Path, name: str, *, size_px: int = 16, **sections: dict[str, Any]) -> RunConfig:
    training = {"num_steps": 4, "images_per_step": 8, "checkpoint_every_steps": 2} | sections.pop("training", {})
    config = tiny_config(
        str(folder),
        recipe="dinov2-digits",
        run={"name": name},
        data={"num_images": 60},
        training=training,
        tracking={"knn_images": 0},
        **sections,
    )
    views = dataclasses.replace(
        config.views,
        global_views=dataclasses.replace(config.views.global_views, size_px=size_px),
        local_views=dataclasses.replace(config.views.local_views, size_px=8),
        evaluation_resize_px=size_px,
    )
    return dataclasses.replace(config, views=views)


def _larger(folder: Path, name: str) -> RunConfig:
    return _config(folder, name, size_px=32, training={"initial_run": str(folder / "first")})


def _checkpoints(folder: Path) -> CheckpointStore:
    return CheckpointStore(str(folder / "first" / "checkpoints"), run_identity=None, keep=1)


def _started(config: RunConfig) -> Trainee:
    return build_trainee_of(build_method_at_start(config), config, World(), torch.device("cpu"))


def test_starts_with_the_weights_of_student_teacher_and_heads_and_a_new_optimizer(first: Path) -> None:
    newest = _checkpoints(first).load(4)
    trainee = _started(_larger(first, "x"))
    for name, tensor in trainee.method.state_dict().items():
        assert torch.equal(tensor, newest.method[name]), name
    assert not torch.equal(newest.method["teacher_head.mlp.0.weight"], newest.method["head.mlp.0.weight"])
    assert not trainee.optimizer.state_dict()["state"]


def test_position_embeddings_of_another_image_size_are_interpolated(first: Path) -> None:
    config = _larger(first, "x")
    backbone = dataclasses.replace(config.method.backbone, image_px=32)
    trainee = _started(dataclasses.replace(config, method=dataclasses.replace(config.method, backbone=backbone)))
    own = trainee.method.state_dict()
    for name in ("backbone.pos_embed", "teacher_backbone.pos_embed"):
        before = _checkpoints(first).load(4).method[name]
        assert before.shape[1] == 16 and own[name].shape[1] == 64
        assert torch.equal(own[name], resample_abs_pos_embed(before, [8, 8], num_prefix_tokens=0))


def test_last_phase_at_a_higher_resolution_resumes_to_the_bit(first: Path) -> None:
    straight = pretrain_in_process(_larger(first, "straight"))
    assert straight is not None and straight["problems"] == []
    shutil.copytree(first / "straight", first / "resumed")
    shutil.rmtree(first / "resumed" / "checkpoints" / "step-00000004")
    for name in ("summary.json", "trained.json"):
        (first / "resumed" / name).unlink(missing_ok=True)
    resumed = pretrain_in_process(_larger(first, "resumed"))
    assert resumed is not None and resumed["num_resumes"] == 1
    assert resumed["weights_digest"] == straight["weights_digest"]


def test_what_does_not_fit_is_refused(first: Path, tmp_path: Path) -> None:
    asked = {"training": {"initial_run": str(first / "first")}}
    with pytest.raises(CheckpointError, match=r"initial_run=.* does not fit: \d+ tensors .* config.json says; for its"):
        pretrain_in_process(tiny_config(str(tmp_path), recipe="dino-digits", **asked))
    with pytest.raises(CheckpointError, match=r"initial_run=.*there is no checkpoint; give the folder of a run"):
        pretrain_in_process(tiny_config(str(tmp_path), training={"initial_run": str(tmp_path)}))
    with pytest.raises(ConfigError, match="initial_run=.*None with training.initial_weights"):
        tiny_config(str(tmp_path), training={"initial_run": "a", "initial_weights": "b"})


def test_encoder_before_training_is_that_of_the_first_run(first: Path) -> None:
    config = _larger(first, "measured")
    tracking = dataclasses.replace(config.tracking, knn_images=40, knn_every_epochs=1)
    summary = pretrain_in_process(dataclasses.replace(config, tracking=tracking))
    assert summary is not None
    (before, *_) = read_records(first / "measured", EVALUATIONS)
    assert before["step"] == 0 and before["metrics"]["eval/knn_top1"] == summary["knn_top1_untrained"]


def test_run_keeps_to_one_checkpoint_of_the_first_run(first: Path) -> None:
    pinned = pin_initial_run(_larger(first, "x"))
    assert pinned.training.initial_run == str(first / "first" / "checkpoints" / "step-00000004")
    assert pin_initial_run(pinned) == pinned
    start, store = build_method_at_start(pinned).state_dict(), _checkpoints(first)
    assert weights_digest(start) == weights_digest(store.load(4).method) != weights_digest(store.load(2).method)


def test_run_on_a_bucket_gives_the_same_weights_and_keeps_to_its_checkpoint(first: Path) -> None:
    here = weights_digest(build_method_at_start(_larger(first, "x")).state_dict())
    with s3_server() as uri:
        upload(first / "first", uri.format("/first"))
        training = {"initial_run": uri.format("/first")}
        pinned = pin_initial_run(_config(first, "x", size_px=32, training=training))
        assert pinned.training.initial_run == uri.format("/first/checkpoints/step-00000004")
        assert pin_initial_run(pinned) == pinned
        assert weights_digest(build_method_at_start(pinned).state_dict()) == here


def test_newer_weights_of_the_first_run_make_another_run(first: Path) -> None:
    shutil.copytree(first / "first", first / "source")
    config = _config(first, "second", training={"initial_run": str(first / "source"), "num_steps": 1})
    pretrain_in_process(config)
    shutil.rmtree(first / "source" / "checkpoints" / "step-00000004")
    with pytest.raises(CheckpointError, match="initial weights"):
        pretrain_in_process(config)
