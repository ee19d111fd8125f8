"""What the driver passes to every trainer. Imports no networks: Ray Train's controller loads it too."""

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from hvp_ray.launch.board import Unread
from hvp_ray.runs.job import RunJob
from hvp_ray.stream.pool import num_restarts
from hvp_ray.stream.roster import Roster
from hvp_ray.stream.spilling import spilled_bytes

_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSetup:
    """Values and handles that the driver passes to every trainer."""

    job: RunJob
    board: Any
    """Handle of `RunBoard`."""
    knn: Any
    """Handle of `SnapshotKnnActor`. None: no k-NN during training."""
    spilled_before: int
    """Bytes that the object stores had spilled before the run."""

    def wait_for_workers(self) -> bool:
        """Wait until a view worker is up. False: the driver has ended the run."""
        while True:
            with contextlib.suppress(ActorUnavailableError):  # the link was cut
                if ray.get(self.board.read_roster.remote()) is not None:
                    return True
                if ray.get(self.board.read.remote()).fatal is not None:
                    return False
            time.sleep(_POLL_SECONDS)

    def roster(self) -> Roster:
        """Return the view workers that get requests now, once `wait_for_workers` has returned."""
        roster: Unread[Roster] = ray.get(self.board.read_roster.remote())
        return roster.read()

    def cluster_facts(self) -> dict[str, float]:
        """Return the cluster's spilled bytes and worker restarts of this run so far."""
        roster = self.roster()
        return {
            "spilled_bytes": spilled_bytes() - self.spilled_before,
            "num_worker_restarts": num_restarts(roster.actor_ids) + roster.num_restarts_of_ended,
        }

    def cluster_metrics(self) -> dict[str, float]:
        """Return the facts under their names in Prometheus."""
        facts = self.cluster_facts()
        return {
            "hvp_ray_spilled_bytes": float(facts["spilled_bytes"]),
            "hvp_ray_worker_restarts": float(facts["num_worker_restarts"]),
        }
