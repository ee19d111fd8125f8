"""Runs as single Ray tasks, each of which renders its own views, anywhere on the cluster.

A task whose process or node dies is started again, on any node, and resumes from its newest checkpoint. Deaths count only
as long as the run records no new step: nodes may come and go during a long run, but a run that kills its process ends.
"""

import hashlib
import logging
import socket
import time
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hvp_ray.comparison.study import RECORD, PlannedRun, Study
from hvp_ray.config import RunConfig, config_from_dict, config_to_dict
from hvp_ray.errors import ConfigError, StageError, first_line
from hvp_ray.files import is_uri, place_in, read_file
from hvp_ray.identity import Identity
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.launch.placement import Resources, room_for
from hvp_ray.launch.stop import RayProcesses, StopRequest, stop_on_signals
from hvp_ray.runs.after_training import MAX_DEATHS, forgive_death
from hvp_ray.tracking.run_log import last_recorded_step

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_CHECK_SECONDS = 60.0
"""Longest wait for the check of all nodes; a task repeats the check on its node."""
_DEATHS = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)


def record_digest(study: Study) -> str:
    """Return the digest of comparison.json, by which other nodes tell that they see the comparison.

    Raises:
        ConfigError: it cannot be read.
    """
    digest, problem = _digest_of(study.location)
    if digest is None:
        raise ConfigError(f"{problem}; repair the storage, and start the comparison again")
    return digest


def check_nodes(study: Study, digest: str) -> None:
    """Check that all nodes which may do a run see the comparison's folder; without it they would train on their own disks.

    Raises:
        ConfigError: a node does not.
    """
    reserved = resources_of_inline(study.base)
    nodes = [node for node in ray.nodes() if node["Alive"] and room_for(node["Resources"], reserved)]
    nodes = [node for node in nodes if node["NodeID"] != ray.get_runtime_context().get_node_id()]
    here = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    checks = [_check_task.options(scheduling_strategy=node).remote(study.location, digest) for node in here]
    if not checks:
        return
    answered, silent = ray.wait(checks, num_returns=len(checks), timeout=_CHECK_SECONDS)
    if silent:
        logger.warning("%d of %d nodes have not answered; every run checks its own node", len(silent), len(checks))
    problems = []
    for check in answered:
        try:
            problems.append(ray.get(check))
        except RayError as error:  # the node was lost, or is broken in another way
            logger.warning("a node could not be checked: %s", first_line(error))
    if any(problems):
        raise ConfigError("; ".join(problem for problem in problems if problem))


class Deaths:
    """Counts the deaths of a run's processes since it last recorded a new step."""

    def __init__(self) -> None:
        self.number = 0
        self.furthest_step = -1

    def note(self, recorded_step: int) -> None:
        """Count a death; `recorded_step` is the newest step in the run's log, -1 if it cannot be read."""
        self.number = 1 if recorded_step > self.furthest_step else self.number + 1
        self.furthest_step = max(self.furthest_step, recorded_step)

    @property
    def are_too_many(self) -> bool:
        """Whether the run shall not be started again. Parts after training are skipped in time for the last start."""
        return self.number > MAX_DEATHS


def do_inline(run: PlannedRun, stop: StopRequest, *, digest: str) -> None:
    """Do one run as a task, again after each death of its process or node.

    Raises:
        RayError: the run failed, or was stopped at once.
        StageError: it died too often without a new step.
    """
    # One job, whoever starts it: a new task succeeds a lost one, and those of a starter that lost the comparison.
    token = hashlib.sha256(run.location.encode()).hexdigest()[:16]
    deaths = Deaths()
    while True:
        try:
            _do_task(run, stop, token=token, digest=digest)
            return
        except _DEATHS as error:
            if stop.is_asked:
                raise
            deaths.note(_recorded_step(run))
            if deaths.are_too_many:
                after = (
                    f"after step {deaths.furthest_step}" if deaths.furthest_step >= 0 else "before any recorded step"
                )
                raise StageError(
                    f"its process or node died {deaths.number} times without a new step {after} "
                    f"(the last time: {first_line(error)}). Give it more memory or, if nodes live too short for a "
                    f"checkpoint, lower training.checkpoint_every_steps, which changes no result"
                ) from error
            logger.warning("the process or node of %s died; it continues on any node", run.name)
            time.sleep(_POLL_SECONDS)


def _do_task(run: PlannedRun, stop: StopRequest, *, token: str, digest: str) -> None:
    reserved = resources_of_inline(run.config)
    task = _pretrain_task.options(num_cpus=reserved["CPU"], num_gpus=reserved["GPU"], name=run.name).remote(
        config_to_dict(run.config), run.identity, token, digest
    )
    was_cancelled, was_forced, ray_processes = False, False, RayProcesses(stop)
    while not ray.wait([task], timeout=_POLL_SECONDS)[0]:
        ray_processes.check()
        if stop.is_asked and not was_cancelled:
            ray.cancel(task)
            was_cancelled = True
        if stop.is_overdue:
            ray.cancel(task, force=True)
            was_forced = True
    try:
        ray.get(task)
    finally:
        if was_forced:
            forgive_death(run.location)


def resources_of_inline(config: RunConfig) -> Resources:
    """Return what Ray reserves for a run that renders in its own process."""
    return {"CPU": float(config.training.torch_threads), "GPU": float(config.cluster.device == "cuda")}


def _recorded_step(run: PlannedRun) -> int:
    try:
        return last_recorded_step(run.location)
    except OSError as error:
        logger.debug("%s: %s", run.name, first_line(error))
        return -1


@ray.remote(max_retries=0)  # `do_inline` retries, because it knows whether the run progresses
def _pretrain_task(config: dict[str, Any], planned: Identity, token: str, digest: str) -> None:
    """Do one run in this process. `ray.cancel` arrives as SIGINT and stops it after a checkpoint."""
    logging.getLogger("hvp_ray").setLevel(logging.ERROR)
    run = config_from_dict(config)
    if problem := _problem_with(_comparison_of(run), digest):
        raise ConfigError(problem)
    stop = StopRequest()
    with stop_on_signals(stop):
        pretrain_in_process(
            run,
            report_progress=lambda _progress: stop.is_asked,
            is_stop_requested=lambda: stop.is_asked,
            planned=planned,
            token=token,
        )


@ray.remote(num_cpus=0, max_retries=0)
def _check_task(location: str, digest: str) -> str | None:
    return _problem_with(location, digest)


def _comparison_of(run: RunConfig) -> str:
    assert run.run.output is not None and run.tracking.comparison is not None  # set by the driver, for all nodes
    return place_in(run.run.output, run.tracking.comparison)


def _problem_with(location: str, digest: str) -> str | None:
    """Return why this node does not see the comparison that the driver sees; None: it does."""
    found, problem = _digest_of(location)
    if found == digest:
        return None
    here = (
        f"the node {socket.gethostname()} does not see the comparison {location}: {problem or 'another one is there'}"
    )
    if is_uri(location):
        return f"{here}. Every node needs access to the bucket, by its environment or role"
    return (
        f"{here}, so the nodes do not share this folder. Set run.output to a folder on a disk that all nodes see at this "
        f"path, or to a URI (s3://, gs://, ...)"
    )


def _digest_of(location: str) -> tuple[str | None, str]:
    path = place_in(location, RECORD)
    try:
        content = read_file(path)
    except (ConfigError, OSError) as error:
        return None, f"{path} cannot be read: {first_line(error)}"
    if content is None:
        return None, f"there is no {path}"
    return hashlib.sha256(content).hexdigest(), ""
