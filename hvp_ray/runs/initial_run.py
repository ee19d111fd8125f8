"""The run that another one starts from with all its weights (`training.initial_run`)."""

import dataclasses
import re

from hvp_ray.config import RunConfig
from hvp_ray.errors import CheckpointError
from hvp_ray.files import place_in, split_location
from hvp_ray.local_cache import with_local_weights
from hvp_ray.methods.initial_weights import load_initial_state
from hvp_ray.methods.method import ALONE, Method, Ranks
from hvp_ray.runs.checkpoint import STEP_FOLDER, CheckpointStore
from hvp_ray.training.trainee import build_untrained_method


def pin_initial_run(config: RunConfig) -> RunConfig:
    """Return the config with the folder of one checkpoint as `training.initial_run`: the run's newest.

    All ranks and evaluations then read the same weights, even if that run goes on.

    Raises:
        CheckpointError: it has no checkpoint, or cannot be reached.
    """
    run = config.training.initial_run
    if run is None:
        return config
    store, step = _find(run)
    training = dataclasses.replace(config.training, initial_run=store.folder_of(step))
    return dataclasses.replace(config, training=training)


def digest_of_initial_run(run: str) -> str:
    """Return the digest of its checkpoint.

    Raises:
        CheckpointError: it has none, or it cannot be read.
    """
    store, step = _find(run)
    return store.digest(step)


def build_method_at_start(config: RunConfig, ranks: Ranks = ALONE) -> Method:
    """Build the method with the weights that training starts from.

    Raises:
        CheckpointError: the initial weights are missing, damaged or fit another network.
    """
    method, run = build_untrained_method(with_local_weights(config), ranks), config.training.initial_run
    if run is not None:
        store, step = _find(run)
        load_initial_state(method, store.load(step).method, run)
    return method


def _find(run: str) -> tuple[CheckpointStore, int]:
    """Return the checkpoints of a run, and the step of the one that is meant.

    Args:
        run: folder of a run, or of one of its checkpoints.
    """
    checkpoints, name = split_location(run)
    of_step = re.fullmatch(STEP_FOLDER, name)
    if of_step is not None:
        return CheckpointStore(checkpoints, run_identity=None, keep=1), int(of_step[1])
    store = CheckpointStore(place_in(run, "checkpoints"), run_identity=None, keep=1)
    steps = store.committed_steps()
    if not steps:
        raise CheckpointError(f"training.initial_run={run!r}: there is no checkpoint; give the folder of a run")
    return store, steps[-1]
