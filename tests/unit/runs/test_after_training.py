"""After the last step: nothing that follows training fails the run, and a restart trains no step again."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

from hvp_ray.config import RunConfig
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.methods.configs import SimSiamConfig
from hvp_ray.methods.method import ALONE, Ranks
from hvp_ray.methods.simsiam import SimSiam
from hvp_ray.runs.after_training import TRAINED, AfterTraining, forgive_death
from hvp_ray.tracking.run_log import METRICS, read_records
from tests.helpers import tiny_config

ROOT = Path(__file__).parents[3]


class Fragile(SimSiam):
    """SimSiam whose encoder raises `failure` in evaluation mode."""

    failure: ClassVar[BaseException | None] = None

    def __init__(self, config: SimSiamConfig, ranks: Ranks = ALONE) -> None:
        super().__init__(config, ranks)
        self.backbone.register_forward_pre_hook(_fail_in_evaluation)


def _fail_in_evaluation(module: nn.Module, _: Any) -> None:
    if not module.training and Fragile.failure is not None:
        raise Fragile.failure


@dataclass(frozen=True, kw_only=True, slots=True)
class FragileConfig(SimSiamConfig):
    implementation: ClassVar[str] = "tests.unit.runs.test_after_training:Fragile"


def _config(folder: Path, **tracking: object) -> RunConfig:
    plain = tiny_config(str(folder)).method
    method = FragileConfig(
        backbone=plain.backbone,
        projector_layers=2,
        projector_dim=128,
        predictor_hidden_dim=64,
    )
    config = tiny_config(str(folder), run={"name": "run"}, training={"num_steps": 4}, tracking=tracking)
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return RunConfig(**values | {"method": method})


def _fail(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    monkeypatch.setattr(Fragile, "failure", error)


def test_evaluation_that_fails_leaves_a_finished_run_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail(monkeypatch, RuntimeError("CUDA out of memory\nsecond line"))
    summary = pretrain_in_process(_config(tmp_path))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_steps"] == 4
    assert (tmp_path / "run" / "backbone.safetensors").exists()
    assert summary["knn_top1"] is summary["knn5shot_top1"] is summary["knn_top1_untrained"] is None
    assert summary["knn_top1_pixels"] > 0.2
    assert len(summary["problems"]) == 2
    assert summary["problems"][0] == "k-NN of the trained encoder failed: RuntimeError: CUDA out of memory"
    assert not (tmp_path / "run" / TRAINED).exists()
    _fail(monkeypatch, None)
    repeated = pretrain_in_process(_config(tmp_path))
    assert repeated is not None
    assert repeated["problems"] == []
    assert repeated["knn_top1"] is not None
    kept = ("weights_digest", "train_seconds", "images_per_second", "loss_first", "peak_memory_bytes")
    assert {name: repeated[name] for name in kept} == {name: summary[name] for name in kept}
    assert [record["step"] for record in read_records(tmp_path / "run", METRICS)] == [1, 2, 3, 4]


def test_figure_that_fails_leaves_a_finished_run_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(monkeypatch, None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figures").write_text("a file in the place of the folder")
    summary = pretrain_in_process(_config(tmp_path, num_figure_images=2))
    assert summary is not None
    assert summary["knn_top1"] is not None
    assert len(summary["problems"]) == 2
    assert summary["problems"][0].startswith("figures failed: FileExistsError: ")
    assert summary["problems"][1].startswith("figure of nearest neighbours failed: NotADirectoryError: ")
    assert "figures failed: FileExistsError" in (tmp_path / "run" / "report.html").read_text()


def test_run_that_was_interrupted_in_its_evaluation_trains_no_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pretrain_in_process(_config(tmp_path))
    run = tmp_path / "run"
    assert not (run / "summary.json").exists()
    assert (run / "backbone.safetensors").exists()
    of_training = json.loads((run / TRAINED).read_text())["summary"]
    _fail(monkeypatch, None)
    summary = pretrain_in_process(_config(tmp_path))
    assert summary is not None
    assert summary["problems"] == []
    assert summary["knn_top1"] is not None
    assert summary["num_resumes"] == 1
    measured = (
        "train_seconds",
        "images_per_second",
        "step_seconds_median",
        "view_bytes",
        "loss_last",
        "weights_digest",
    )
    assert {name: summary[name] for name in measured} == {name: of_training[name] for name in measured}
    assert summary["images_per_second"] > 0.0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


DIES = """
import os, sys
from pathlib import Path
from hvp_ray.runs.after_training import AfterTraining

after = AfterTraining(Path(sys.argv[1]), {"num_steps": 4}, [], may_continue=True)
assert after.attempt("figures", lambda: 1) == 1
after.attempt("k-NN", lambda: os.kill(os.getpid(), 9))
after.attempt("k-NN of pixels", lambda: os.kill(os.getpid(), 9))
print(*after.problems, sep="\\n")
"""


def _die(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DIES, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_part_in_which_the_process_died_twice_is_left_out_and_a_third_death_is_the_last(tmp_path: Path) -> None:
    outcomes = [_die(tmp_path) for _ in range(4)]
    assert [outcome.returncode for outcome in outcomes] == [*[-signal.SIGKILL] * 3, 0], outcomes[-1].stderr
    assert outcomes[-1].stdout.splitlines() == [
        "k-NN was left out: the process died 2 times in it, perhaps because memory ran out",
        "k-NN of pixels was left out: the process died 3 times after training, perhaps because memory ran out",
    ]


def test_run_whose_figures_killed_the_process_twice_still_has_its_k_nn(tmp_path: Path) -> None:
    died = {"summary": {}, "problems": [], "survived": [], "begun": "figures", "deaths_in_parts": {"figures": 1}}
    (tmp_path / TRAINED).write_text(json.dumps(died))
    after = AfterTraining(tmp_path, {}, [], may_continue=True)
    assert after.attempt("figures", lambda: 1) is None
    assert after.attempt("k-NN", lambda: 2) == 2
    assert len(after.problems) == 1


def test_process_that_was_ended_on_request_did_not_die(tmp_path: Path) -> None:
    for _ in range(3):
        assert _die(tmp_path).returncode == -signal.SIGKILL
        forgive_death(str(tmp_path))
    after = AfterTraining(tmp_path, {}, [], may_continue=True)
    assert after.attempt("k-NN", lambda: 1) == 1
    after.finish()
    forgive_death(str(tmp_path))
    assert not (tmp_path / TRAINED).exists()


def test_stop_in_the_evaluation_ends_between_two_parts_and_the_next_start_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail(monkeypatch, None)
    asked: list[bool] = []

    def is_stop_requested() -> bool:
        asked.append(True)
        return len(asked) == 3

    run = tmp_path / "run"
    assert pretrain_in_process(_config(tmp_path), is_stop_requested=is_stop_requested) is None
    assert (run / TRAINED).exists() and not (run / "summary.json").exists()
    assert json.loads((run / TRAINED).read_text())["begun"] is None
    summary = pretrain_in_process(_config(tmp_path))
    assert summary is not None and summary["knn_top1"] is not None and summary["problems"] == []
    assert [record["step"] for record in read_records(run, METRICS)] == [1, 2, 3, 4]


def test_training_that_was_done_again_forgets_the_deaths_of_before(tmp_path: Path) -> None:
    stale = {
        "summary": {"num_steps": 4, "train_seconds": 1.0},
        "deaths_in_parts": {"k-NN": 2},
        "begun": "k-NN",
        "problems": ["x"],
    }
    (tmp_path / TRAINED).write_text(json.dumps(stale))
    after = AfterTraining(tmp_path, {"num_steps": 4, "train_seconds": 2.0}, [], may_continue=False)
    assert after.summary == {"num_steps": 4, "train_seconds": 2.0}
    assert after.problems == []
    assert after.attempt("k-NN", lambda: 1) == 1
