"""Start runs on the session's Ray, read their journals, and find their processes."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from hvp_ray.config import RunConfig
from hvp_ray.launch.driver import Watchers, launch
from hvp_ray.launch.stop import StopRequest
from hvp_ray.runs.checkpoint import CheckpointStore, weights_digest
from hvp_ray.tracking.run_log import ATTEMPTS, METRICS, read_records


def launch_quietly(
    config: RunConfig, messages: list[str] | None = None, *, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Launch; return the summary."""
    sink = messages if messages is not None else []
    watchers = Watchers(
        announce=lambda announcement: None, show_progress=lambda progress: None, show_message=sink.append
    )
    return launch(config, watchers, stop=stop)[0]


def digest_from_checkpoint(run_dir: Path) -> str:
    """Compute the digest of the final weights from the newest checkpoint on disk."""
    identity = json.loads((run_dir / "config.json").read_text())["run_identity"]
    checkpoint = CheckpointStore(str(run_dir / "checkpoints"), run_identity=identity, keep=9).load_newest()
    assert checkpoint is not None
    return weights_digest(checkpoint.method)


def recorded_steps(run_dir: Path) -> list[int]:
    """Return the steps in the journal."""
    return [record["step"] for record in read_records(run_dir, METRICS)]


def _bytes_of(run_dir: Path) -> int:
    return sum(path.stat().st_size for path in run_dir.glob("log/*/metrics.jsonl"))


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Return when and where the run was started and resumed."""
    return list(read_records(run_dir, ATTEMPTS, dropped=True))


def processes_titled(text: str) -> list[psutil.Process]:
    """Return the processes below this one whose title contains `text`."""
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if text in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class AtStep(threading.Thread):
    """Calls `action` once for each of `steps`, when the journal of `run_dir` has recorded it."""

    def __init__(self, run_dir: Path, steps: list[int], action: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self._run_dir = run_dir
        self._steps = steps
        self._action = action
        self.fired: list[int] = []
        """Newest recorded step at each call of `action`."""
        self._ended = threading.Event()

    def run(self) -> None:
        for step in self._steps:
            size = -1
            while not self._ended.is_set():
                time.sleep(0.002)
                if size == (size := _bytes_of(self._run_dir)):
                    continue  # reading it all the time would take a core from the run
                steps = recorded_steps(self._run_dir)
                started_again = not self.fired or len(attempts(self._run_dir)) > len(self.fired)
                if started_again and steps and steps[-1] >= step:
                    self.fired.append(steps[-1])
                    self._action(step)
                    break

    def end(self) -> None:
        self._ended.set()
        self.join(timeout=10)
