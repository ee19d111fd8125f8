"""The k-NN during training: it changes no weight, waits for nobody, and a restart loses no point of the curve."""

import pickle
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import CheckpointError, DataError
from hvp_ray.evaluation.snapshot import SnapshotKnn, snapshot_encoder
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.methods.backbones import build_backbone
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.online_knn import KnnDuringTraining
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.progress import RunSteps
from hvp_ray.tracking.run_log import EVALUATIONS, RunLog, next_attempt, read_records
from tests.helpers import ProgramInAPickle, tiny_config
from tests.unit.data.made import draw_images, write_folder


def _run(folder: Path, name: str, **tracking: object) -> dict[str, Any]:
    config = tiny_config(str(folder), run={"name": name}, training={"epochs": 3}, tracking=tracking)
    summary = pretrain_in_process(config)
    assert summary is not None
    return summary


def test_curve_begins_untrained_ends_with_the_final_value_and_changes_no_weight(tmp_path: Path) -> None:
    plain, watched = _run(tmp_path, "plain"), _run(tmp_path, "watched", knn_every_epochs=1)
    assert plain["weights_digest"] == watched["weights_digest"]
    records = list(read_records(tmp_path / "watched", EVALUATIONS))
    per_epoch = watched["num_steps"] // 3
    assert [record["step"] for record in records] == [0, per_epoch, 2 * per_epoch, 3 * per_epoch]
    assert records[0]["metrics"]["eval/knn_top1"] == watched["knn_top1_untrained"]
    assert records[-1]["metrics"]["eval/knn_top1"] == watched["knn_top1"]
    assert records[-1]["metrics"]["eval/knn5shot_top1"] == watched["knn5shot_top1"]
    assert not list((tmp_path / "watched" / "knn_pending").iterdir())


_Answer = Future[dict[str, float]]


def _watch(folder: Path, asked: list[_Answer], first_step: int) -> KnnDuringTraining:
    encoder = nn.Linear(1, 1)

    def ask(snapshot: bytes) -> _Answer:
        asked.append(_Answer())
        assert snapshot == snapshot_encoder(encoder) or first_step
        return asked[-1]

    log = RunLog(folder, attempt=next_attempt(folder), first_step=first_step)
    steps = RunSteps(first_step=first_step, num_steps=8, steps_per_epoch=2)
    return KnnDuringTraining(log, encoder, ask, [], interval=2, steps=steps)


def _steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_records(folder, EVALUATIONS)]


def test_answers_are_not_waited_for_and_come_in_order(tmp_path: Path) -> None:
    asked: list[_Answer] = []
    watch = _watch(tmp_path, asked, 0)
    for step in range(1, 5):
        watch.after_step(step)
    assert len(asked) == 3 and _steps(tmp_path) == []  # steps 0, 2, 4
    asked[1].set_result({"eval/knn_top1": 0.5})
    watch.after_step(5)
    assert _steps(tmp_path) == []
    asked[0].set_result({"eval/knn_top1": 0.5})
    watch.after_step(5)
    assert _steps(tmp_path) == [0, 2]


def test_evaluation_that_fails_is_a_gap_in_the_curve_and_a_sentence(tmp_path: Path) -> None:
    problems: list[str] = []
    asked: list[bytes] = []

    def ask(snapshot: bytes) -> _Answer:
        asked.append(snapshot)
        answer = _Answer()
        match len(asked):
            case 1:
                raise OSError("the test images are on a disk that is gone")
            case 2:
                answer.set_exception(RuntimeError("CUDA out of memory"))
            case _:
                answer.set_result({"eval/knn_top1": 0.5})
        return answer

    steps = RunSteps(first_step=0, num_steps=6, steps_per_epoch=2)
    watch = KnnDuringTraining(RunLog(tmp_path), nn.Linear(1, 1), ask, problems, interval=2, steps=steps)
    for step in range(1, 7):
        watch.after_step(step)
    watch.finish({"eval/knn_top1": 1.0})
    assert len(asked) == 3
    assert _steps(tmp_path) == [4, 6]
    assert problems == [
        "the k-NN during training after step 0 failed: OSError: the test images are on a disk that is gone",
        "the k-NN during training after step 2 failed: RuntimeError: CUDA out of memory",
    ]
    assert not list((tmp_path / "knn_pending").iterdir())


def test_restart_asks_again_for_what_had_no_answer(tmp_path: Path) -> None:
    """Died at step 5 with the answers of steps 2 and 4 to come; the checkpoint is that of step 3."""
    before: list[_Answer] = []
    watch = _watch(tmp_path, before, 0)
    before[0].set_result({"eval/knn_top1": 0.5})
    for step in range(1, 6):
        watch.after_step(step)
    after: list[_Answer] = []
    again = _watch(tmp_path, after, 3)
    assert len(after) == 1  # step 2; step 4 will be trained again
    for step in range(4, 8):
        again.after_step(step)
    for answer in after:
        answer.set_result({"eval/knn_top1": 0.5})
    again.finish({"eval/knn_top1": 1.0})
    assert _steps(tmp_path) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("answered", [True, False])
def test_restart_before_the_first_checkpoint_has_the_first_point_once(tmp_path: Path, answered: bool) -> None:
    asked: list[_Answer] = []
    torch.manual_seed(0)
    killed = _watch(tmp_path, asked, 0)
    if answered:
        asked[0].set_result({"eval/knn_top1": 0.5})
        killed.after_step(1)
    again: list[_Answer] = []
    torch.manual_seed(0)
    watch = _watch(tmp_path, again, 0)
    assert len(again) == (0 if answered else 1)
    for answer in again:
        answer.set_result({"eval/knn_top1": 0.5})
    watch.finish({"eval/knn_top1": 1.0})
    assert _steps(tmp_path) == [0, 8]


def test_restart_after_the_last_step_has_the_final_point_once(tmp_path: Path) -> None:
    """Killed when the final values were written and the summary was not: the next attempt has no step to do."""
    asked: list[_Answer] = []
    killed = _watch(tmp_path, asked, 0)
    asked[0].set_result({"eval/knn_top1": 0.5})
    killed.finish({"eval/knn_top1": 1.0})
    again: list[_Answer] = []
    watch = _watch(tmp_path, again, 8)
    watch.finish({"eval/knn_top1": 1.0})
    assert not again
    assert _steps(tmp_path) == [0, 8]


def test_snapshot_evaluates_like_the_encoder_itself(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), run={"name": "one"}, training={"num_steps": 2})
    summary = pretrain_in_process(config)
    assert summary is not None
    content = (tmp_path / "one" / "backbone.safetensors").read_bytes()
    values = SnapshotKnn(config, torch.device("cpu")).evaluate(content)
    assert values == {"eval/knn_top1": summary["knn_top1"], "eval/knn5shot_top1": summary["knn5shot_top1"]}


@pytest.mark.parametrize("part", ["source", "test_source"])
def test_images_that_changed_since_the_run_was_prepared_are_not_evaluated_on(
    tmp_path: Path, generator: np.random.Generator, part: str
) -> None:
    """Without a file the ids name other images, and a test image may have been trained on."""
    folders = {"source": write_folder(tmp_path / "images", draw_images(40, generator))}
    if part == "test_source":
        folders["test_source"] = write_folder(tmp_path / "test", draw_images(12, generator))
    data: dict[str, object] = {name: str(folder) for name, folder in folders.items()}
    config = tiny_config(str(tmp_path / "runs"), run={"name": "r"}, data=data | {"num_images": None})
    job = prepare_run(config, resolve_inline(config.cluster))
    snapshot = snapshot_encoder(build_backbone(config.method.backbone))

    def evaluate() -> dict[str, float]:
        knn = SnapshotKnn(config, torch.device("cpu"), fingerprint=job.data_fingerprint, test_data=job.test_data)
        return knn.evaluate(snapshot)

    assert evaluate()
    next(folders[part].rglob("*.png")).unlink()
    with pytest.raises(DataError, match=rf"data\.{part}=.* has changed since the run was started"):
        evaluate()
    with pytest.raises(DataError, match="has changed since"):
        open_dataset(config.data, fingerprint=job.data_fingerprint, test_data=job.test_data)


def test_program_in_the_place_of_a_snapshot_is_not_run(tmp_path: Path) -> None:
    knn = SnapshotKnn(tiny_config(str(tmp_path)), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="holds no weights of this encoder.*knn_pending"):
        knn.evaluate(pickle.dumps(ProgramInAPickle(tmp_path / "proof")))
    with pytest.raises(CheckpointError, match="holds no weights of this encoder"):
        knn.evaluate(snapshot_encoder(nn.Linear(1, 1)))
    assert not (tmp_path / "proof").exists()
