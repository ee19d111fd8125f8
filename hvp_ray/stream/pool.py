"""The pool of view workers. The driver owns it, so it survives a restart of the trainers."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError

from hvp_ray.config import RendererName, RunConfig, config_to_dict
from hvp_ray.errors import ConfigError, StageError
from hvp_ray.stream.connect import is_ray_lost

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 300.0
_RETRY_SECONDS = 0.5
_POLL_SECONDS = 0.5
_MAX_WAIT_FOR_OTHERS_SECONDS = 10.0
"""Longest wait for the other workers once one is up."""


class ViewWorkerPool:
    """Starts and ends workers. Ray restarts a dead worker; `view_stream` retries its requests.

    Args:
        config: the run.
        renderer: its resolved renderer.
        resources: Ray resource -> amount that one worker reserves.
        data_fingerprint: expected fingerprint; a worker that opens other data fails. None: no check.
    """

    def __init__(
        self,
        config: RunConfig,
        renderer: RendererName,
        resources: Mapping[str, float],
        data_fingerprint: str | None = None,
    ) -> None:
        from hvp_ray.stream.view_worker import ViewWorkerActor

        self.workers: dict[int, ActorHandle[Any]] = {}
        """Number of a worker -> its handle; all that have not been ended. A number is never used twice."""
        self.starting: dict[int, Any] = {}
        """The workers of `start_pool` that were not up when it returned -> reference that is ready when they are."""
        self.num_restarts_of_ended = 0
        """How often Ray restarted the workers that have been ended."""
        self._num_started = 0
        self._is_closed = False
        self._lock = threading.Lock()
        """A run may close the pool while the supervisor still changes it."""
        labels = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        self._actor = ViewWorkerActor.options(
            num_cpus=resources.get("CPU", 0.0), num_gpus=resources.get("GPU", 0.0), resources=labels
        )
        self._arguments = (config_to_dict(config), renderer)
        self._data_fingerprint = data_fingerprint

    def start(self, count: int) -> dict[int, Any]:
        """Start workers without waiting for them.

        Returns:
            Number of a worker -> reference of its process id, which is ready when the worker is up. A closed pool starts
            none.
        """
        calls: dict[int, Any] = {}
        with self._lock:
            for number in range(self._num_started, self._num_started + (0 if self._is_closed else count)):
                worker = self._actor.remote(*self._arguments, f"view-worker-{number}", self._data_fingerprint)
                self.workers[number] = worker
                self._num_started += 1
                calls[number] = worker.process_id.remote()
        return calls

    def end(self, numbers: Collection[int]) -> None:
        """End these workers at once, unless they have been ended."""
        ids = [worker._actor_id.hex() for number in numbers if (worker := self.workers.get(number)) is not None]
        self.num_restarts_of_ended += num_restarts(ids)
        self._kill(numbers)

    def actor_ids(self) -> tuple[str, ...]:
        """Return Ray's ids of the workers that have not been ended."""
        return tuple(worker._actor_id.hex() for worker in list(self.workers.values()))

    def node_ids(self) -> dict[int, str]:
        """Return the number of each worker that has been placed -> Ray's id of its node."""
        places = {number: _actor_record(worker._actor_id.hex()) for number, worker in list(self.workers.items())}
        nodes = {number: record.get("Address", {}).get("NodeID", "") for number, record in places.items()}
        return {number: node for number, node in nodes.items() if node}

    def close(self) -> None:
        """End all workers. No more are started."""
        with self._lock:
            self._is_closed = True
            self._kill(list(self.workers))

    def _kill(self, numbers: Collection[int]) -> None:
        for number in numbers:
            worker = self.workers.pop(number, None)
            if worker is not None:
                ray.kill(worker, no_restart=True)


def num_restarts(actor_ids: Collection[str]) -> int:
    """Return how often Ray restarted these actors."""
    return sum(int(_actor_record(actor_id).get("NumRestarts", 0)) for actor_id in actor_ids)


def _actor_record(actor_id: str) -> dict[str, Any]:
    record: dict[str, Any] = ray._private.state.actors(actor_id)
    return record


def start_pool(
    config: RunConfig,
    renderer: RendererName,
    num_workers: int,
    resources: Mapping[str, float],
    *,
    data_fingerprint: str | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> ViewWorkerPool:
    """Start the workers and wait until one is up, then as long again for the others, at most 10 s. Others join later.

    If another worker can start, one that cannot (its node lacks a package, or does not see the data) is left out with a
    warning.

    Args:
        config: the run.
        renderer: its resolved renderer.
        num_workers: number of workers to start.
        resources: Ray resource -> amount that one worker reserves.
        data_fingerprint: expected fingerprint; a worker that opens other data fails. None: no check.
        must_stop: polled; if it returns True, the wait ends.

    Raises:
        ConfigError: no worker could open the data or make its renderer, or none was up in time.
        StageError: `must_stop` returned True.
    """
    pool = ViewWorkerPool(config, renderer, resources, data_fingerprint)
    try:
        started_at = time.monotonic()
        reasons, pool.starting = _wait_for_one(pool.start(num_workers), pool.workers, resources, must_stop)
        seconds = min(time.monotonic() - started_at, _MAX_WAIT_FOR_OTHERS_SECONDS)
        if pool.starting:
            ray.wait(list(pool.starting.values()), num_returns=len(pool.starting), timeout=seconds)
    except BaseException:
        if not is_ray_lost():
            pool.close()
        raise
    for number, reason in reasons.items():
        logger.warning("view worker %d could not start and is left out: %s", number, reason)
    pool.end(reasons)
    return pool


def _wait_for_one(
    started: Mapping[int, Any],
    workers: Mapping[int, ActorHandle[Any]],
    resources: Mapping[str, float],
    must_stop: Callable[[], bool],
) -> tuple[dict[int, str], dict[int, Any]]:
    """Wait until a worker is up; return the reasons of failed workers and the pending calls of starting ones."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    reasons: dict[int, str] = {}
    dying: dict[int, str] = {}
    calls = {reference: index for index, reference in started.items()}
    while calls:
        seconds_left = deadline - time.monotonic()
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=min(_POLL_SECONDS, max(0.0, seconds_left)))
        if must_stop():
            raise StageError("stopped before a view worker was up")
        if not ready and seconds_left > 0.0:
            continue
        if not ready or (dying and time.monotonic() > deadline):
            known = "; ".join(f"view worker {index}: {why}" for index, why in sorted((reasons | dying).items()))
            raise ConfigError(
                f"no view worker was up within {START_TIMEOUT_SECONDS:.0f} s; "
                + (f"known so far: {known}; " if known else "")
                + f"the cluster has {ray.available_resources()} free and each worker needs {dict(resources)}. See "
                "`ray status` and `ray logs`, or lower cluster.num_view_workers"
            )
        index = calls.pop(ready[0])
        try:
            ray.get(ready[0])
            return reasons, {number: reference for reference, number in calls.items()}
        except ActorUnavailableError:  # Ray restarts the process
            dying[index] = "its process died while it started"
            time.sleep(_RETRY_SECONDS)
            calls[workers[index].process_id.remote()] = index
        except RayError as error:
            reasons[index] = why_not_started(error)
    why = "; ".join(dict.fromkeys(reasons.values()))
    raise ConfigError(f"no view worker could start: {why}; repair the cause on the nodes, then start again")


def why_not_started(error: RayError) -> str:
    """Return in one line why a worker's constructor failed."""
    return str(error).strip().splitlines()[-1]
