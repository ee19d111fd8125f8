"""How the driver waits for the nodes of a cluster that it joined."""

from collections.abc import Iterator

import pytest

from hvp_ray.config import ClusterConfig
from hvp_ray.errors import ConfigError
from hvp_ray.launch import driver
from hvp_ray.launch.placement import PrefetchError
from hvp_ray.launch.stop import StoppedError, StopRequest
from hvp_ray.resolved_run import ResolvedRun

RESOLVED = ResolvedRun(renderer="cpu", device="cpu", num_view_workers=1, batches_in_flight=4)


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Resources of a cluster whose view nodes have joined; each pause lets a second pass."""
    seconds = iter(range(10_000))
    found = {"CPU": 4.0, "view": 2.0}
    monkeypatch.setattr(driver.ray, "cluster_resources", lambda: found)  # type: ignore[attr-defined]
    monkeypatch.setattr(driver.time, "monotonic", lambda: float(next(seconds)))  # type: ignore[attr-defined]
    monkeypatch.setattr(driver.time, "sleep", lambda _seconds: None)  # type: ignore[attr-defined]
    return found


def _wait(answers: Iterator[ResolvedRun | Exception], shown: list[str], stop: StopRequest) -> ResolvedRun:
    def resolve() -> ResolvedRun:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return driver._wait_for_nodes(resolve, ClusterConfig(), stop, shown.append)


def test_a_prefetch_that_does_not_fit_is_judged_when_nodes_of_both_labels_have_joined(
    resources: dict[str, float],
) -> None:
    """The object stores of the nodes that are missing may hold it."""

    def answers() -> Iterator[ResolvedRun | Exception]:
        yield PrefetchError("too small")
        resources["trainer"] = 1.0
        yield RESOLVED

    shown: list[str] = []
    assert _wait(answers(), shown, StopRequest()) is RESOLVED
    assert len(shown) == 1


def test_a_prefetch_that_does_not_fit_a_whole_cluster_is_refused_at_once(resources: dict[str, float]) -> None:
    resources["trainer"] = 1.0
    with pytest.raises(PrefetchError):
        _wait(iter([PrefetchError("too small"), RESOLVED]), [], StopRequest())


def test_a_missing_label_delays_the_refusal_of_a_prefetch_for_seconds_only(resources: dict[str, float]) -> None:
    num_tries = 0

    def answers() -> Iterator[ResolvedRun | Exception]:
        nonlocal num_tries
        while True:
            num_tries += 1
            yield PrefetchError("too small")

    with pytest.raises(PrefetchError):
        _wait(answers(), [], StopRequest())
    assert 2 < num_tries < 20


def test_a_stop_ends_the_wait_for_nodes(resources: dict[str, float]) -> None:
    stop = StopRequest()
    stop.ask()
    with pytest.raises(StoppedError):
        _wait(iter([ConfigError("too few CPUs")]), [], stop)
