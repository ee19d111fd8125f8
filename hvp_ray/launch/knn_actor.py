"""The k-NN during training, in a process of its own that outlives a restart of the trainers."""

from typing import Any

import ray
import torch

from hvp_ray.config import config_from_dict, config_to_dict
from hvp_ray.evaluation.snapshot import SnapshotKnn
from hvp_ray.runs.job import RunJob


class SnapshotKnnActor:
    """Evaluates snapshots of the encoder."""

    def __init__(self, config: dict[str, Any], *, gpu: bool, fingerprint: str, test_data: str) -> None:
        torch.set_num_threads(1)
        device = torch.device("cuda" if gpu else "cpu")
        self._knn = SnapshotKnn(config_from_dict(config), device, fingerprint=fingerprint, test_data=test_data)

    def evaluate(self, snapshot: bytes) -> dict[str, float]:
        """Return the accuracies of one snapshot."""
        return self._knn.evaluate(snapshot)


_Actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=2)(SnapshotKnnActor)


def start_knn(job: RunJob) -> Any:
    """Start the actor of a run. The driver does it, because actors of a trainer die with the trainer."""
    share = job.config.cluster.gpus_for_knn
    return _Actor.options(num_gpus=share).remote(
        config_to_dict(job.config), gpu=share > 0, fingerprint=job.data_fingerprint, test_data=job.test_data
    )
