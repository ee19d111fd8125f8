"""The check of a GPU, rehearsed on a CPU, so that no minute of a GPU is lost to a fault of the program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PARTS = ("a", "b", "c", "d", "e", "g")


@pytest.mark.long
def test_every_part_runs_and_measures_something(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="without DALI most parts are not run")
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "benchmarks/gpu_check.py", "--rehearse", "--parts", ",".join(PARTS)]
    command += [
        "--json",
        str(results),
        "--markdown",
        str(tmp_path / "table.md"),
        "--picture",
        str(tmp_path / "ring.png"),
    ]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert check.returncode == 0, check.stdout[-4000:]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    outcomes = {line["part"]: line["outcome"] for line in lines if "outcome" in line}
    assert set(outcomes) == set(PARTS)
    assert all(outcome.startswith(("done", "stopped")) for outcome in outcomes.values()), outcomes
    assert {line["part"] for line in lines if "name" in line} == set(PARTS)
