"""Connecting to Ray: a cluster that does not answer is one sentence, within a bounded time."""

import socket
from collections.abc import Iterator

import pytest

from hvp_ray.errors import ConfigError
from hvp_ray.stream import connect
from hvp_ray.stream.connect import LocalRay, connect_ray, joins_cluster


def _must_not_start() -> LocalRay:
    raise AssertionError("a local Ray beside the cluster that was named")


@pytest.fixture
def hanging_head() -> Iterator[str]:
    """A port that accepts connections and never answers, as the head of a stopped machine does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead_head() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("head", ["dead_head", "hanging_head"])
def test_head_that_does_not_answer_is_refused_with_its_address(
    head: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue(head)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(connect, "_HEAD_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at RAY_ADDRESS={address} .*unset RAY_ADDRESS"):
        connect_ray(_must_not_start)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "no address"])
def test_address_of_something_else_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(connect, "_HEAD_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        connect_ray(_must_not_start)


def test_empty_address_names_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert not joins_cluster()
