"""The processes of a run on the Ray that this process has started."""

import os
from pathlib import Path

import psutil

from hvp_ray.tracking.run_log import ATTEMPTS, read_records

KINDS = ("view worker", "trainer", "raylet", "GCS")


def trainer_id(run_dir: Path) -> int | None:
    """Return the process id of the trainer of rank 0, of the newest attempt; None: none has begun."""
    attempts = list(read_records(run_dir, ATTEMPTS, dropped=True))
    return int(attempts[-1]["process_id"]) if attempts else None


def view_workers() -> list[psutil.Process]:
    """Return the view workers, those included that are about to start."""
    return [process for process in _children() if _title(process).startswith("ray::ViewWorker")]


def memory_of_processes(run_dir: Path) -> dict[str, int]:
    """Return resident memory by kind of process, the mean of its processes, bytes.

    `trainer alone` is the trainer's without what it shares with others: the object store and libraries.
    """
    trainer = trainer_id(run_dir)
    found: dict[str, list[int]] = {}
    for process in [*_children(), psutil.Process(os.getpid())]:
        try:
            kind = _kind(process, trainer)
            if kind is not None:
                found.setdefault(kind, []).append(process.memory_info().rss)
            if kind == "trainer":
                memory = process.memory_info()
                found["trainer alone"] = [memory.rss - memory.shared]
        except psutil.Error:
            continue
    return {kind: sum(values) // len(values) for kind, values in found.items()}


def _kind(process: psutil.Process, trainer: int | None) -> str | None:
    if process.pid == os.getpid():
        return "driver"
    if process.pid == trainer:
        return "trainer"
    if _title(process).startswith("ray::ViewWorker"):
        return "view worker"
    return {"raylet": "raylet", "gcs_server": "GCS"}.get(process.name())


def _children() -> list[psutil.Process]:
    return psutil.Process(os.getpid()).children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
