"""Run compare.py as a user does: to its report, killed and started again, interrupted, and with wrong arguments."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from hvp_ray.cli.command_line import parse_run
from hvp_ray.cli.compare import main
from hvp_ray.comparison.report import write_report
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.comparison.study import open_study
from hvp_ray.data.dataset import open_dataset
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.tracking.run_log import last_recorded_step
from tests.ray.runs import recorded_steps
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
OVERRIDES = {
    "data.num_images": "200",
    "training.epochs": "6",
    "training.images_per_step": "16",
    "training.checkpoint_every_steps": "5",
    "tracking.knn_images": "40",
    "tracking.num_figure_images": "2",
    "tracking.knn_every_epochs": "2",
}


THREE_ARMS = [
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


def _options(output: Path, **changed: str) -> list[str]:
    """Return the command line of a small comparison; `a__b` sets `a.b`."""
    settings = OVERRIDES | {key.replace("__", "."): value for key, value in changed.items()}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return ["simsiam-digits", "--run.output", str(output), *words]


def _start(words: list[str], *, ray_address: str | None = None) -> subprocess.Popen[str]:
    """Start compare.py on a running Ray, or on one that it starts itself."""
    return subprocess.Popen(
        [sys.executable, "pipelines/compare.py", *words],
        cwd=ROOT,
        env=os.environ | ({} if ray_address is None else {"RAY_ADDRESS": ray_address}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _undisturbed_report(output: Path, costs: dict[str, Any]) -> dict[str, Any]:
    """Do these runs one after the other in this process, and write the report."""
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


@pytest.mark.usefixtures("ray_session")
def test_compare_trains_all_arms_and_ends_with_a_report_and_its_runs_in_mlflow(tmp_path: Path) -> None:
    words = [*_options(tmp_path, training__epochs="2"), *THREE_ARMS]
    program = _start(words, ray_address=ray.get_runtime_context().gcs_address)
    printed = program.communicate(timeout=1800)[0]
    assert program.returncode == 0, printed
    _check_report(tmp_path, num_steps=20, printed=printed)


def _check_report(output: Path, *, num_steps: int, printed: str) -> dict[str, Any]:
    """Check runs, text, page and MLflow of a comparison of three arms; return the report."""
    report: dict[str, Any] = json.loads((output / "c" / "report.json").read_text())
    found = [run["num_steps"] for run in report["runs"]]
    assert [run["name"] for run in report["runs"]] == [
        "c-vanilla-s0",
        "c-hardest-s0",
        f"c-vanilla-long-{found[2]}steps-s0",
    ]
    assert found == [num_steps, num_steps, round(num_steps * report["compute_ratio"])]

    assert report["result"] in printed
    assert "All steps take about" in printed and "make ui" not in printed and "viewStateShareKey=c" in printed
    page = (output / "c" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((output / "c" / "figures").glob("*.png"))) >= 8
    assert 'src="http' not in page and 'href="http' not in page
    _check_mlflow(output, report)
    return report


@pytest.mark.long
@pytest.mark.ray
def test_compare_killed_and_started_again_gives_the_report_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Programs with a Ray of their own, because Ray ends with its driver."""

    def trains_the_last_arm() -> bool:
        return any(last_recorded_step(run_dir) >= 10 for run_dir in (tmp_path / "killed").glob("c-vanilla-long-*"))

    words = [*_options(tmp_path / "killed"), *THREE_ARMS]
    first = _start(words)
    wait_until(lambda: trains_the_last_arm() or first.poll() is not None, "steps of the last arm")
    assert first.poll() is None, first.communicate()[0]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "killed" / "c" / "report.json").exists()
    done = {path.parent.name: path.stat().st_mtime for path in (tmp_path / "killed").glob("c-*/summary.json")}
    assert done

    second = _start(words)
    printed = second.communicate(timeout=1800)[0]
    assert second.returncode == 0, printed
    for name, written_at in done.items():
        assert (tmp_path / "killed" / name / "summary.json").stat().st_mtime == written_at, f"{name} was done again"
    killed = _check_report(tmp_path / "killed", num_steps=60, printed=printed)
    straight = _undisturbed_report(tmp_path / "straight", killed["costs"])
    for report in (killed, straight):
        report["settings"].pop("run.output")
    assert killed == straight


def _check_mlflow(output: Path, report: dict[str, Any]) -> None:
    """Check that all runs are flat and tagged, and that the report is an artifact of a run of its own."""
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


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("views", ["inline", "workers"])
def test_runs_side_by_side_are_all_placed_and_an_interrupt_stops_them_after_a_checkpoint(
    tmp_path: Path, views: str
) -> None:
    """The session's Ray has 8 CPUs: two runs fit, each with 3 for its view worker and 1 for its trainer."""
    endless = {"training__epochs": "100000", "training__checkpoint_every_steps": "1000000", "tracking__uri": "none"}
    endless |= {"tracking__knn_every_epochs": "100000", "cluster__cpus_per_view_worker": "3.0"}
    own = ["--comparison", "c", "--views", views, "--seeds", "0", "--arms", "vanilla", "hardest", "--parallel", "2"]
    runs = [tmp_path / f"c-{arm}-s0" for arm in ("vanilla", "hardest")]
    words = [*_options(tmp_path, **endless), *own]
    program = _start(words, ray_address=ray.get_runtime_context().gcs_address)
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
