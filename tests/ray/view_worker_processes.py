"""The processes of view workers, as the operating system sees them: what they do now, and how to stop one in the act.

Ray writes what a worker does into the title of its process.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil

from tests.ray.runs import attempts, processes_titled, recorded_steps

State = Literal["starting", "rendering", "idle", "gone"]

PATIENCE_SECONDS = 600.0
"""A run starts six processes that import PyTorch; a machine whose cores are lent to others takes minutes for that."""


def wait_until(
    condition: Callable[[], bool], what: str, *, seconds: float = PATIENCE_SECONDS, pause: float = 0.02
) -> None:
    """Wait for a condition; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(pause)


def wait_for_step(run_dir: Path, step: int) -> None:
    """Wait until the journal has recorded a step."""
    wait_until(lambda: (recorded_steps(run_dir) or [0])[-1] >= step, f"step {step} of {run_dir.name}")


def state(process: psutil.Process) -> State:
    """Tell what a view worker does now."""
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
    """Return the view workers that are in one of `states`, without those of `but`."""
    return [p for p in processes_titled("ray::ViewWorker") if p not in but and state(p) in states]


def catch(wanted: State, *, but: tuple[psutil.Process, ...] = (), seconds: float = PATIENCE_SECONDS) -> psutil.Process:
    """Return a view worker at a moment when it is in a state; rendering a small batch takes milliseconds, so no pauses."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        workers = [p for p in processes_titled("ray::ViewWorker") if p not in but]
        for _ in range(50):
            for worker in workers:
                if state(worker) == wanted:
                    return worker
    raise TimeoutError(f"waited {seconds:.0f} s for a view worker that is {wanted}")


def stop(wanted: State, *, but: tuple[psutil.Process, ...] = ()) -> psutil.Process:
    """Stop a view worker in the act, and return it: `catch` alone is too late on a machine that is slow itself."""
    while True:
        worker = catch(wanted, but=but)
        worker.suspend()
        wait_until(lambda worker=worker: worker.status() == psutil.STATUS_STOPPED, "a process that stops", pause=0.0)
        if state(worker) == wanted:
            return worker
        worker.resume()


@contextmanager
def trainer_stopped(run_dir: Path) -> Iterator[None]:
    """Stop the first trainer in its tracks: it hears of nothing and takes nothing."""
    trainer = attempts(run_dir)[-1]["process_id"]
    os.kill(trainer, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(trainer, signal.SIGCONT)
