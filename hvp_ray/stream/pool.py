"""Start the pool of view workers. The driver owns it, so it survives a restart of the trainers."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError

from hvp_ray.config import RendererName, RunConfig, config_to_dict
from hvp_ray.errors import ConfigError, StageError

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 300.0
_RETRY_SECONDS = 0.5
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ViewWorkerPool:
    """Handles of the workers. Ray restarts a dead worker; `view_stream` retries its requests."""

    workers: list[ActorHandle[Any]]

    def num_restarts(self) -> int:
        """Return how often Ray restarted workers since the pool was made."""
        records = [ray._private.state.actors(worker._actor_id.hex()) for worker in self.workers]
        return sum(int(record.get("NumRestarts", 0)) for record in records)

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            ray.kill(worker, no_restart=True)


def start_pool(
    config: RunConfig,
    renderer: RendererName,
    num_workers: int,
    resources: Mapping[str, float],
    *,
    data_fingerprint: str | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> ViewWorkerPool:
    """Start the workers and wait until one of them is up; the others may follow.

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
    from hvp_ray.stream.view_worker import ViewWorkerActor

    values = config_to_dict(config)
    labels = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    actor = ViewWorkerActor.options(
        num_cpus=resources.get("CPU", 0.0), num_gpus=resources.get("GPU", 0.0), resources=labels
    )
    workers = [actor.remote(values, renderer, f"view-worker-{index}", data_fingerprint) for index in range(num_workers)]
    try:
        reasons = _wait_for_one(workers, resources, must_stop)
    except BaseException:
        ViewWorkerPool(workers).close()
        raise
    for index, reason in reasons.items():
        logger.warning("view worker %d could not start and is left out: %s", index, reason)
        ray.kill(workers[index])
    return ViewWorkerPool([worker for index, worker in enumerate(workers) if index not in reasons])


def _wait_for_one(
    workers: list[ActorHandle[Any]], resources: Mapping[str, float], must_stop: Callable[[], bool]
) -> dict[int, str]:
    """Wait until a worker is up; return index -> reason for those that are known by then to have failed."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    reasons: dict[int, str] = {}
    dying: dict[int, str] = {}
    calls = {worker.process_id.remote(): index for index, worker in enumerate(workers)}
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
            return reasons
        except ActorUnavailableError:  # Ray restarts the process
            dying[index] = "its process died while it started"
            time.sleep(_RETRY_SECONDS)
            calls[workers[index].process_id.remote()] = index
        except RayError as error:
            reasons[index] = str(error).strip().splitlines()[-1]
    raise ConfigError(f"a view worker could not start: {'; '.join(dict.fromkeys(reasons.values()))}")
