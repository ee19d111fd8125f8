"""What the driver passes to every trainer. Imports no networks: Ray Train's controller loads it too."""

import time
from dataclasses import dataclass
from typing import Any

import ray

from hvp_ray.launch.board import Unread
from hvp_ray.runs.job import RunJob
from hvp_ray.stream.pool import num_restarts
from hvp_ray.stream.roster import Roster
from hvp_ray.stream.spilling import spilled_bytes

_POLL_SECONDS = 0.1


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

    def wait_for_roster(self) -> Roster:
        """Return the view workers that get requests, once one is up. The driver ends the trainers if none is."""
        while (roster := self._roster()) is None:
            time.sleep(_POLL_SECONDS)
        return roster

    def _roster(self) -> Roster | None:
        roster: Unread[Roster] | None = ray.get(self.board.read_roster.remote())
        return None if roster is None else roster.read()

    def cluster_facts(self) -> dict[str, float]:
        """Return the cluster's spilled bytes and worker restarts of this run so far."""
        roster = self._roster()
        restarts = 0 if roster is None else num_restarts(roster.actor_ids) + roster.num_restarts_of_ended
        return {"spilled_bytes": spilled_bytes() - self.spilled_before, "num_worker_restarts": restarts}

    def cluster_metrics(self) -> dict[str, float]:
        """Return the facts under their names in Prometheus."""
        facts = self.cluster_facts()
        return {
            "hvp_ray_spilled_bytes": float(facts["spilled_bytes"]),
            "hvp_ray_worker_restarts": float(facts["num_worker_restarts"]),
        }
