"""The driver watches a run: it shows progress, relays a stop, and finds out how the run ended."""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from hvp_ray.errors import StageError, TrainingError
from hvp_ray.launch.board import BoardContent, BoardReader
from hvp_ray.launch.ray_train import END_SECONDS, TrainersThread
from hvp_ray.launch.stop import RayProcesses, StoppedError, StopRequest
from hvp_ray.runs.job import RunJob
from hvp_ray.runs.progress import Progress

_POLL_SECONDS = 0.5
_SILENCE_SECONDS = 120.0
_STOPPED = "stopped after writing a checkpoint"
_NO_CHECKPOINT = "stopped before the trainers wrote a checkpoint, so the previous one counts"
_TRAINED = "stopped during the evaluation, after all steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """Facts of a run that is resolved and prepared, before anything starts."""

    job: RunJob
    joined_cluster: bool
    prefetch_bytes: int
    """Object store that prefetched batches and the batch in use take at most."""


def _ignore(_: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Watchers:
    """Functions that show what happens. The driver calls them in its own thread. By default nothing is shown."""

    announce: Callable[[Announcement], None] = _ignore
    show_progress: Callable[[Progress], None] = _ignore
    show_message: Callable[[str], None] = _ignore


def watch(board: Any, trainers: TrainersThread, job: RunJob, watchers: Watchers, stop: StopRequest) -> dict[str, Any]:
    """Show what is on the board until the trainers have ended; return the summary.

    Raises:
        StoppedError: the run was asked to stop.
        TrainingError: a trainer met an error that a restart does not fix.
        StageError: the trainers failed too often, or Ray died.
    """
    waiting = _WaitingNotice(job.resolved.trainer_resources, watchers.show_message)
    reader, ray_processes = BoardReader(board), RayProcesses(stop)
    shown: Progress | None = None
    content: BoardContent | None = None
    stop_was_sent = is_trained = False
    while True:
        ended = not trainers.is_alive()
        if stop.is_asked and not stop_was_sent:
            watchers.show_message("asked to stop: the trainers finish their step and write a checkpoint")
            board.request_stop.remote()
            stop_was_sent = True
        try:
            content = reader.poll(_POLL_SECONDS)
        except RayError:  # the board runs on this node and ends with Ray
            trainers.join(timeout=END_SECONDS)
            ray_processes.check(patience_seconds=0.0)
            raise
        if content is not None:
            is_trained = content.is_trained
            for message in content.messages:
                watchers.show_message(message)
            if content.progress is not None and content.progress != shown:
                shown = content.progress
                watchers.show_progress(shown)
                waiting.note_step(is_last=shown.steps_done >= shown.num_steps)
            if content.fatal is not None:
                raise TrainingError(content.fatal)
            if ended:
                return _outcome(content, trainers, stop, job)
        ray_processes.check()
        waiting.show_if_due()
        if stop.is_overdue:
            raise stopped(_TRAINED if is_trained else _NO_CHECKPOINT, job)
        trainers.join(timeout=_POLL_SECONDS)


def stopped(what: str, job: RunJob) -> StoppedError:
    """Return the error of a run that was asked to stop, with the command that continues it."""
    output = "" if job.config.run.output is None else f" --run.output {shlex.quote(job.config.run.output)}"
    return StoppedError(f"{what}; to continue: hvp-ray pretrain --run.name {shlex.quote(job.run_name)}{output}")


def _outcome(content: BoardContent, trainers: TrainersThread, stop: StopRequest, job: RunJob) -> dict[str, Any]:
    """Return the summary of a run whose trainers have ended, or raise why there is none."""
    if content.summary is not None:
        return content.summary
    if stop.is_asked:
        raise stopped(_TRAINED if content.is_trained else _STOPPED, job)
    if trainers.error is not None:
        raise StageError(
            f"the trainers failed more than cluster.max_trainer_failures times; start the run again with its name to "
            f"continue from the last checkpoint. The last failure:\n{trainers.error}"
        ) from trainers.error
    raise StageError("the trainers ended without a summary; see Ray's logs")


class _WaitingNotice:
    """Shows what may be missing if no step is done for long: Ray silently queues trainers that do not fit."""

    def __init__(self, trainer_resources: Mapping[str, float], show: Callable[[str], None]) -> None:
        self._trainer_resources = trainer_resources
        self._show = show
        self._since = time.monotonic()
        self._due_seconds = _SILENCE_SECONDS

    def note_step(self, *, is_last: bool) -> None:
        """Record that a step was done."""
        self._since = time.monotonic()
        self._due_seconds = float("inf") if is_last else _SILENCE_SECONDS

    def show_if_due(self) -> None:
        """Show the notice if it is due, and double the time until the next one."""
        seconds = time.monotonic() - self._since
        if seconds < self._due_seconds:
            return
        self._due_seconds = 2.0 * seconds
        hidden = ("memory", "object_store_memory")
        free = {
            name: amount
            for name, amount in ray.available_resources().items()
            if name not in hidden and not name.startswith("node:")
        }
        self._show(
            f"no step finished for {seconds:.0f} s. The machines may be slow, or Ray has queued the trainers. Each trainer "
            f"needs {_amounts(self._trainer_resources)}; free: {_amounts(free) or 'none'}. `ray status` shows what is in use"
        )


def _amounts(resources: Mapping[str, float]) -> str:
    """Return the non-zero resources as text, such as `1 CPU, 2 GPU`."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)
