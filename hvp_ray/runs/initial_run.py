"""The run that another one starts from with all its weights (`training.initial_run`)."""

import dataclasses

from hvp_ray.config import RunConfig
from hvp_ray.errors import CheckpointError
from hvp_ray.files import place_in
from hvp_ray.runs.checkpoint import CheckpointStore
from hvp_ray.training.trainee import Checkpoint


def load_initial_run(config: RunConfig) -> Checkpoint | None:
    """Return the newest weights of `training.initial_run`, as of step 0; None: it is not set.

    Raises:
        CheckpointError: it has no checkpoint, or none that can be used.
    """
    run = config.training.initial_run
    if run is None:
        return None
    newest = _store_of(run).load_newest()
    if newest is None:
        raise _absent(run)
    return dataclasses.replace(newest, step=0, optimizer={}, predictor={})


def digest_of_initial_run(run: str) -> str:
    """Return the digest of its newest checkpoint.

    Raises:
        CheckpointError: it has no checkpoint, or it cannot be read.
    """
    digest = _store_of(run).digest_of_newest()
    if digest is None:
        raise _absent(run)
    return digest


def _store_of(run: str) -> CheckpointStore:
    return CheckpointStore(place_in(run, "checkpoints"), run_identity=None, keep=1)


def _absent(run: str) -> CheckpointError:
    return CheckpointError(f"training.initial_run={run!r}: there is no checkpoint; give the folder of a run")
