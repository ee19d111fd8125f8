"""Find out what view workers do now, and stop one in the act, by the titles that Ray gives their processes."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil

from tests.ray.runs import attempts, processes_titled, recorded_steps
from tests.waiting import PATIENCE_SECONDS, wait_until

State = Literal["starting", "rendering", "idle", "gone"]


def wait_for_step(run_dir: Path, step: int) -> None:
    """Wait until the journal has recorded a step."""
    wait_until(lambda: (recorded_steps(run_dir) or [0])[-1] >= step, f"step {step} of {run_dir.name}")


def state(process: psutil.Process) -> State:
    """Return what a view worker does now."""
    try:
        title = "".join(process.cmdline())
    except psutil.Error:
        return "gone"
    states: dict[str, State] = {
        "ray::ViewWorker.__init__": "starting",
        "ray::ViewWorker.render": "rendering",
        "ray::ViewWorker.decode": "rendering",  # its half of it
    }
    return states.get(title, "idle" if title == "ray::ViewWorker" else "gone")


def in_state(*states: State, but: tuple[psutil.Process, ...] = ()) -> list[psutil.Process]:
    """Return the view workers in one of `states`, except those in `but`."""
    return [p for p in processes_titled("ray::ViewWorker") if p not in but and state(p) in states]


def catch(wanted: State, *, but: tuple[psutil.Process, ...] = (), seconds: float = PATIENCE_SECONDS) -> psutil.Process:
    """Return a view worker while it is in a state; poll without pauses, because rendering a batch takes milliseconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        workers = [p for p in processes_titled("ray::ViewWorker") if p not in but]
        for _ in range(50):
            for worker in workers:
                if state(worker) == wanted:
                    return worker
    raise TimeoutError(f"waited {seconds:.0f} s for a view worker that is {wanted}")


def stop(wanted: State, *, but: tuple[psutil.Process, ...] = ()) -> psutil.Process:
    """Stop a view worker in the act, and return it; after `catch` alone it may have left the state."""
    while True:
        worker = catch(wanted, but=but)
        worker.suspend()
        wait_until(lambda worker=worker: worker.status() == psutil.STATUS_STOPPED, "a process to stop", pause=0.0)
        if state(worker) == wanted:
            return worker
        worker.resume()


@contextmanager
def trainer_stopped(run_dir: Path) -> Iterator[None]:
    """Suspend the first trainer: it receives nothing and requests nothing."""
    trainer = attempts(run_dir)[-1]["process_id"]
    os.kill(trainer, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(trainer, signal.SIGCONT)
