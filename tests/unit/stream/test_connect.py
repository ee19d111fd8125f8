"""Connecting to Ray: a cluster that does not answer is reported in one sentence, within a bounded time."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray

from hvp_ray.errors import ConfigError
from hvp_ray.stream import connect
from hvp_ray.stream.connect import LocalRay, connect_ray, end_ray, is_abandoned, joins_cluster


@pytest.fixture
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that starts; this process may have run tests on a Ray."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def _must_not_start() -> LocalRay:
    raise AssertionError("a local Ray was started beside the named cluster")


@pytest.fixture
def hanging_head() -> Iterator[str]:
    """Yield an address that accepts connections and never answers, like the head of a suspended machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead_head() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.usefixtures("not_connected")
@pytest.mark.parametrize("head", ["dead_head", "hanging_head"])
def test_head_that_does_not_answer_is_refused_with_its_address(
    head: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue(head)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(connect, "_HEAD_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at RAY_ADDRESS={address} .*unset RAY_ADDRESS"):
        connect_ray(_must_not_start)


@pytest.mark.usefixtures("not_connected")
@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "no address"])
def test_address_of_something_else_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(connect, "_HEAD_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        connect_ray(_must_not_start)


@pytest.mark.parametrize("address", ["", "local"])
def test_address_that_names_no_cluster(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert not joins_cluster()


@pytest.mark.parametrize(("dead", "is_lost"), [("log_monitor", False), ("raylet", True)])
def test_ray_is_abandoned_only_without_a_process_that_its_shutdown_needs(
    dead: str, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    node = SimpleNamespace(
        dead_processes=lambda: [(dead, None)], kill_all_processes=lambda **_options: calls.append("kill")
    )
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(connect, "_connection", connect._Connection(is_ours=True))
    end_ray()
    assert calls == ["kill" if is_lost else "shutdown"]
    assert is_abandoned() is is_lost
