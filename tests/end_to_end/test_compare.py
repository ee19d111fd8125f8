"""compare.py as a user runs it: killed half-way and started again, it ends with the report of an undisturbed one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from hvp_ray.comparison.report import write_report
from hvp_ray.comparison.study import open_study
from hvp_ray.data.dataset import open_dataset
from hvp_ray.launch.local import pretrain_in_process
from pipelines.command_line import parse_run
from pipelines.compare import main
from tests.ray.runs import recorded_steps
from tests.ray.view_worker_processes import wait_until

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

OVERRIDES = {
    "data.num_images": "200",
    "training.epochs": "6",
    "training.images_per_step": "16",
    "training.checkpoint_every_steps": "5",
    "tracking.knn_images": "40",
    "tracking.num_figure_images": "2",
    "tracking.knn_every_epochs": "2",
}


def _options(output: Path) -> list[str]:
    words = [word for name, value in OVERRIDES.items() for word in (f"--{name}", value)]
    return ["simsiam-digits", "--run.output", str(output), *words]


def _start(output: Path) -> subprocess.Popen[str]:
    own = [
        "--accounting",
        "counted",
        "--seeds",
        "0",
        "--arms",
        "vanilla",
        "hardest",
        "vanilla-long",
        "--comparison",
        "c",
    ]
    return subprocess.Popen(
        [sys.executable, "pipelines/compare.py", *_options(output), *own],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _undisturbed_report(output: Path, costs: dict[str, Any]) -> dict[str, Any]:
    """Do the same runs one after the other in this process, and write the report."""
    from hvp_ray.comparison.step_cost import StepCost

    base = parse_run([*_options(output), "--cluster.device", "cpu"], program="compare.py", description="")
    study = open_study(
        base,
        open_dataset(base.data),
        name="c",
        arm_names=["vanilla", "hardest", "vanilla-long"],
        seeds=[0],
        accounting="counted",
        measure=lambda arms: {arm: StepCost(**costs[arm]) for arm in arms},
    )
    for run in study.runs():
        quiet = dataclasses.replace(run.config.tracking, uri="none")
        pretrain_in_process(dataclasses.replace(run.config, tracking=quiet))
    content: dict[str, Any] = json.loads(write_report(study, metric="knn_top1").json_path.read_text())
    return content


def test_compare_killed_and_started_again_gives_the_report_of_an_undisturbed_one(tmp_path: Path) -> None:
    first = _start(tmp_path / "killed")
    deadline = time.monotonic() + 1200
    while not any(path.stat().st_size >= 2000 for path in (tmp_path / "killed").glob("c-vanilla-long-*/metrics.jsonl")):
        assert first.poll() is None, first.stdout.read() if first.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "killed" / "c" / "report.json").exists()
    done = {path.parent.name: path.stat().st_mtime for path in (tmp_path / "killed").glob("c-*/summary.json")}
    assert done

    second = _start(tmp_path / "killed")
    printed = second.communicate(timeout=1800)[0]
    assert second.returncode == 0, printed
    for name, written_at in done.items():
        assert (tmp_path / "killed" / name / "summary.json").stat().st_mtime == written_at, f"{name} was done again"
    killed = json.loads((tmp_path / "killed" / "c" / "report.json").read_text())
    straight = _undisturbed_report(tmp_path / "straight", killed["costs"])
    for report in (killed, straight):
        report["settings"].pop("run.output")
    assert killed == straight
    num_steps = [run["num_steps"] for run in killed["runs"]]
    assert [run["name"] for run in killed["runs"]] == [
        "c-vanilla-s0",
        "c-hardest-s0",
        f"c-vanilla-long-{num_steps[2]}steps-s0",
    ]
    assert num_steps[:2] == [60, 60] and num_steps[2] == round(60 * killed["compute_ratio"])

    assert killed["result"] in printed
    assert "all of it takes about" in printed and "make ui" not in printed and "viewStateShareKey=c" in printed
    page = (tmp_path / "killed" / "c" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((tmp_path / "killed" / "c" / "figures").glob("*.png"))) >= 8
    assert 'src="http' not in page and 'href="http' not in page
    _check_mlflow(tmp_path / "killed", killed)


def _check_mlflow(output: Path, report: dict[str, Any]) -> None:
    """All runs are flat, tagged, and the report is an artifact of a run of its own."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    experiment = client.get_experiment_by_name("hvp_ray")
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id], filter_string="tags.comparison = 'c' and tags.arm != 'report'"
    )
    assert {run.info.run_name for run in runs} == {run["name"] for run in report["runs"]}
    assert {(run.data.tags["arm"], run.data.tags["trained_views"]) for run in runs} == {
        (arm, arm) for arm in (run["name"].removeprefix("c-").removesuffix("-s0") for run in report["runs"])
    }
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("mlflow.parentRunId" not in run.data.tags for run in runs)
    by_name = {run.info.run_name: run for run in runs}
    for wanted in report["runs"]:
        history = client.get_metric_history(by_name[wanted["name"]].info.run_id, "eval/knn_top1")
        got = [(metric.step, metric.value) for metric in history]
        assert got == [(point["step"], point["values"]["knn_top1"]) for point in wanted["curve"]]
    (published,) = client.search_runs([experiment.experiment_id], filter_string="tags.arm = 'report'")
    artifacts = {file.path for file in client.list_artifacts(published.info.run_id)}
    assert {"report.html", "report.json", "figures"} <= artifacts
    state = json.loads(experiment.tags["mlflow.sharedViewState.c"])
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "trained_views"}]
    assert report["result"] in experiment.tags["mlflow.note.content"]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("views", ["inline", "workers"])
def test_runs_side_by_side_are_all_placed_and_an_interrupt_stops_them_after_a_checkpoint(
    tmp_path: Path, views: str
) -> None:
    """The session's Ray has 8 CPUs. Three of a view worker and one of a trainer fit twice, if each run takes its part."""
    changed = {"training.epochs": "100000", "training.checkpoint_every_steps": "1000000", "tracking.uri": "none"}
    changed |= {"tracking.knn_every_epochs": "100000", "cluster.cpus_per_view_worker": "3.0"}
    words = [word for name, value in changed.items() for word in (f"--{name}", value)]
    own = ["--comparison", "c", "--views", views, "--seeds", "0", "--arms", "vanilla", "hardest", "--parallel", "2"]
    runs = [tmp_path / f"c-{arm}-s0" for arm in ("vanilla", "hardest")]
    program = subprocess.Popen(
        [sys.executable, "pipelines/compare.py", *_options(tmp_path), *words, *own],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: all(map(recorded_steps, runs)) or program.poll() is not None, "steps of both runs")
    program.send_signal(signal.SIGINT)
    printed = program.communicate()[0]
    assert program.returncode == 130, printed
    assert "the same command continues" in printed
    assert "Traceback" not in printed
    for run in runs:
        assert not (run / "summary.json").exists()
        (manifest,) = (run / "checkpoints").glob("step-*/manifest.json")
        assert int(manifest.parent.name.removeprefix("step-")) >= recorded_steps(run)[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "vanilla", "hardst"], "did you mean 'hardest'"),
        (["--arms", "hardest"], "vanilla is missing"),
        (["--seeds", "-1"], "seed"),
        (["--data.test_fraction", "0.0"], "judged by k-NN"),
        (["--metric", "accuracy"], "knn5shot_top1"),
        (["--parallel", "0"], "--parallel"),
        (["--training.epoch", "3"], "training.epoch"),
        (["simsiam-digit"], "did you mean 'simsiam-digits'"),
    ],
)
def test_wrong_arguments_end_before_anything_starts(
    tmp_path: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main([*words, "--run.output", str(tmp_path)])
    except SystemExit as stop:  # tyro has printed why
        status = int(stop.code or 0)
    assert status != 0
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
