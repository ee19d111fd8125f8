"""Compare runs of a cluster with each other and with MLflow; run it on the head, which sees the runs and MLflow.

python check_runs.py RUNS_FOLDER CALM=DISTURBED [CALM=DISTURBED ...]

Prints one line for each pair. Ends with 1 if weights differ, a step is missing or doubled, or the points in MLflow differ
from metrics.jsonl (of metrics of speed: their steps).
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import mlflow

_OF_THE_MACHINE = ("perf/", "stream/")
"""Metrics that differ if a step is trained again after a resume: MLflow may keep another value, so steps are compared."""


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary and the records of `metrics.jsonl`."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary, [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def find_faults(name: str, summary: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    """Return the faults of a run's steps, in its `metrics.jsonl` and in MLflow."""
    steps = list(range(1, summary["num_steps"] + 1))
    faults = (
        [] if [record["step"] for record in records] == steps else [f"{name}: metrics.jsonl lacks or doubles steps"]
    )
    client = mlflow.MlflowClient()
    run = client.get_run(summary["mlflow_run_id"])
    if run.info.status != "FINISHED":
        faults.append(f"{name}: its status in MLflow is {run.info.status}")
    for key in sorted({key for record in records for key in record["metrics"]}):
        expected = [(record["step"], record["metrics"][key]) for record in records if key in record["metrics"]]
        found = sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))
        if key.startswith(_OF_THE_MACHINE):
            expected, found = [(step, 0.0) for step, _ in expected], [(step, 0.0) for step, _ in found]
        if found != expected:
            faults.append(f"{name}: {key} differs between its {len(found)} points in MLflow and metrics.jsonl")
    return faults


def main(folder: Path, pairs: list[str]) -> int:
    """Compare all pairs; return the exit status."""
    faults: list[str] = []
    for pair in pairs:
        names = pair.split("=")
        runs = {name: read_run(folder / name) for name in names}
        for name, (summary, records) in runs.items():
            faults += find_faults(name, summary, records)
        (calm, _), (disturbed, records) = (runs[name] for name in names)
        same = calm["weights_digest"] == disturbed["weights_digest"]
        if not same:
            faults.append(f"{pair}: weights differ")
        pause = max(after["time"] - before["time"] for before, after in itertools.pairwise(records))
        print(
            f"{pair}: weights {'equal to the bit' if same else 'DIFFER'} ({disturbed['weights_digest'][:12]}), "
            f"{disturbed['num_steps']} steps, {disturbed['num_resumes']} resume(s) of the trainer, "
            f"{disturbed['num_worker_restarts']} restart(s) of view workers, longest pause {pause:.1f} s, "
            f"data wait {disturbed['data_wait_fraction']:.1%}"
        )
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
