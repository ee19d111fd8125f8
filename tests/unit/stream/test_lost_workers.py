"""If a worker's constructor raises, Ray does not restart it: the trainer reports the reason and does not wait."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from torch import device

from hvp_ray.config import ClusterConfig, config_to_dict
from hvp_ray.errors import ChangedDataError, StageError
from hvp_ray.records import BatchRequest
from hvp_ray.stream import view_worker
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.view_stream import ViewStream
from hvp_ray.stream.view_worker import ViewWorker
from tests.helpers import tiny_config

REASON = "data.source='images' has changed since the run was started"


class _EndedError(Exception):
    """Stands for the end of the process."""


def _end(_status: int) -> None:
    raise _EndedError


@pytest.mark.parametrize(
    ("source", "fingerprint", "expected"),
    [("digits", "that of other images", ChangedDataError), ("/nowhere/images", None, _EndedError)],
)
def test_worker_that_starts_again_gives_up_on_changed_data_only(
    source: str, fingerprint: str | None, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreachable storage may recover, so the process ends and Ray restarts it."""
    again = SimpleNamespace(was_current_actor_reconstructed=True)
    monkeypatch.setattr(view_worker.ray, "get_runtime_context", lambda: again)
    monkeypatch.setattr(view_worker, "MetricsPublisher", lambda *_: SimpleNamespace(watch=lambda _: None))
    monkeypatch.setattr(view_worker, "set_up_logging", lambda **_: None)  # it would change those of this process
    monkeypatch.setattr(view_worker, "_START_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(view_worker.os, "_exit", _end)
    config = tiny_config("unused", data={"source": source, "num_images": None})
    with pytest.raises(expected):
        ViewWorker(config_to_dict(config), "cpu", "worker", fingerprint)


def _worker() -> Any:
    """Return an actor that dies with its first batch; its constructor raises when Ray restarts it."""
    cause = RayTaskError("__init__", f"Traceback\n{REASON}", ChangedDataError(REASON), "worker", 1, "127.0.0.1")
    return Mock(
        spec=ActorHandle,
        render=SimpleNamespace(remote=lambda _request: ActorUnavailableError("died", None)),
        process_id=SimpleNamespace(remote=lambda: ActorDiedError(cause)),
    )


def _raise(error: Exception, timeout: float | None = None) -> Any:
    raise error


def test_last_worker_that_cannot_start_again_ends_the_stream_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "get", _raise)
    monkeypatch.setattr(ray, "wait", lambda references, **_options: (references[:1], references[1:]))
    stream = ViewStream(
        {0: _worker(), 1: _worker()},
        lambda step: BatchRequest(step=step, epoch=0, first_position=0, sample_ids=np.arange(4), num_views=2),
        range(2),
        cluster=ClusterConfig(batches_in_flight=2),
        copy_to_device=CopyToDevice(device("cpu")),
    )
    with pytest.raises(StageError, match=f"no view worker is left.*{REASON}"):
        stream.next_batch()
    stream.close()
    assert caplog.text.count("lost for the run") == 2
    assert caplog.text.count(REASON) == 2
