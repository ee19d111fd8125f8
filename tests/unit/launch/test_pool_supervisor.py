"""What the supervisor does with a pool while nodes, trainers and answers of Ray come and go. Ray's side is on paper."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from hvp_ray.launch import board as board_module
from hvp_ray.launch import pool_supervisor
from hvp_ray.launch.board import RosterPoster, RunBoard, Unread
from hvp_ray.launch.pool_supervisor import ClusterNodes, PoolSupervisor
from hvp_ray.resolved_run import ResolvedRun
from hvp_ray.runs.job import RunJob
from hvp_ray.stream import pool as pool_module
from hvp_ray.stream.pool import ViewWorkerPool
from hvp_ray.stream.roster import Roster, StreamReport
from tests.helpers import tiny_config

POLL_SECONDS = 2.0


class Scene:
    """A real pool, board and supervisor on nodes, actors, trainers and a clock of paper. `ray.get` calls what it is given."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        num_workers: int,
        nodes: dict[str, int],
        selection: dict[str, object] | None = None,
        **cluster: Any,
    ):
        self.now = 1000.0
        self.cpus, self.draining = dict(nodes), set[str]()
        self.homes: dict[str, str] = {}
        """Worker -> its node, once it is placed."""
        self.actors: list[str] = []
        """The workers that have not been ended."""
        self.num_restarts = 0
        """Of each worker."""
        self.board = RunBoard()
        self.failures: list[RayError] = []
        """Raised by the next publications."""
        cluster |= {"num_view_workers": "auto"}
        config = tiny_config("unused", cluster=cluster, training={"images_per_step": 12}, selection=selection or {})
        self.trainers = dict.fromkeys(range(config.cluster.num_trainers), "trainers")
        """Rank -> its node, for the trainers that live."""
        self.num_ranks = len(self.trainers)
        self.waits_per_poll = 0.0
        self.busy_workers = 0.5
        records = SimpleNamespace(state=SimpleNamespace(actors=self._record))
        monkeypatch.setattr(pool_module, "ray", SimpleNamespace(kill=self._kill, _private=records))
        monkeypatch.setattr(
            pool_supervisor, "ray", SimpleNamespace(get=lambda call, timeout=None: call(), wait=self._wait)
        )
        monkeypatch.setattr(pool_supervisor, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(pool_supervisor, "read_nodes", self._nodes)
        resources = {"CPU": 1.0}
        self.pool = ViewWorkerPool(config, "cpu", resources)
        self.pool._actor = SimpleNamespace(remote=self._actor)  # type: ignore[assignment]
        calls = self.pool.start(num_workers)
        self._place()
        self.pool.starting = {number: calls[number] for number in calls if f"view-worker-{number}" not in self.homes}
        resolved = ResolvedRun(
            renderer="cpu",
            device="cpu",
            num_view_workers=num_workers,
            batches_in_flight=1,
            trainer_resources=resources,
            view_worker_resources=resources,
        )
        job = RunJob(
            config=config,
            token="",
            run_name="run",
            run_dir=Path("unused"),
            run_identity="",
            resolved=resolved,
            trackers=(),
            data_fingerprint="",
            test_data="",
            inventory=None,
        )
        handle = SimpleNamespace(
            **{name: _Method(getattr(self.board, name)) for name in ("post_message", "take_reports")},
            publish_roster=SimpleNamespace(remote=lambda version, roster: lambda: self._publish(version, roster)),
        )
        self.supervisor = PoolSupervisor(self.pool, handle, job, bytes_per_step=1000, num_sharing=1)

    def _actor(self, _config: object, _renderer: object, name: str, _fingerprint: object) -> Any:
        def process_id() -> None:
            if name not in self.homes:
                raise GetTimeoutError

        self.actors.append(name)
        return SimpleNamespace(
            _actor_id=SimpleNamespace(hex=lambda: name), process_id=SimpleNamespace(remote=lambda: process_id)
        )

    def _kill(self, worker: Any, no_restart: bool) -> None:
        assert no_restart
        self.actors.remove(worker._actor_id.hex())

    def _record(self, name: str) -> dict[str, Any]:
        return {"Address": {"NodeID": self.homes.get(name, "")}, "NumRestarts": self.num_restarts}

    def _wait(self, calls: list[Callable[[], None]], timeout: float) -> tuple[list[Any], list[Any]]:
        try:
            calls[0]()
        except GetTimeoutError:
            return [], calls
        return calls, []

    def _free(self, node: str) -> int:
        homes = [self.homes.get(name) for name in self.actors]
        return self.cpus[node] - [*homes, *self.trainers.values()].count(node)

    def _place(self) -> None:
        for name in self.actors:
            node = next((n for n in self.cpus if n not in self.draining and self._free(n) > 0), None)
            if name not in self.homes and node is not None:
                self.homes[name] = node

    def _nodes(self) -> ClusterNodes:
        usable = [node for node in self.cpus if node not in self.draining]
        return ClusterNodes(
            total={node: {"CPU": float(self.cpus[node]), "object_store_memory": 1e12} for node in usable},
            free={node: {"CPU": float(self._free(node))} for node in usable},
            draining=frozenset(self.draining),
        )

    def _publish(self, version: int, roster: Unread[Roster]) -> None:
        if self.failures:
            raise self.failures.pop()
        self.board.publish_roster(version, roster)

    # What tests do.

    @property
    def living(self) -> set[int]:
        """Workers that have not been ended."""
        assert len(self.actors) == len(self.pool.workers)
        return set(self.pool.workers)

    @property
    def members(self) -> set[int]:
        """Workers on the published roster."""
        return set(self.roster.workers)

    @property
    def roster(self) -> Roster:
        roster = self.board.read_roster()
        assert roster is not None
        return roster.read()

    @property
    def messages(self) -> list[str]:
        return self.board.read().messages

    def poll(self, seconds: float = POLL_SECONDS) -> None:
        """Let time pass, in which the trainers that live report."""
        for _ in range(round(seconds / POLL_SECONDS)):
            self.now += POLL_SECONDS
            for rank in self.trainers:
                self.board.exchange(self._report(rank))
            self._place()
            self.supervisor.poll()

    def _report(self, rank: int) -> StreamReport:
        return StreamReport(
            stream=f"of rank {rank}",
            rank=rank,
            num_ranks=self.num_ranks,
            node_id="trainers",
            version=self.roster.version,
            at_seconds=self.now,
            num_batches=int(self.now),
            worker_seconds=self.busy_workers / self.num_ranks * self.now,
            waits={int(self.now): self.waits_per_poll},
            in_use=frozenset(),
            down=frozenset(),
            lost=frozenset(),
        )


class _Method:
    """A method of an actor, which is called at once."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> Callable[[], Any]:
        answer = self._method(*arguments)
        return lambda: answer


def test_a_worker_that_starts_later_than_the_first_gets_no_requests_until_it_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, num_workers=3, nodes={"trainers": 1, "views": 2})
    assert scene.members == {0, 1}
    scene.poll(20.0)
    assert scene.members == {0, 1}
    scene.cpus["late"] = 1
    scene.poll(4.0)
    assert scene.members == scene.living == {0, 1, 2}


@pytest.mark.parametrize(("delay", "in_flight"), [(32, 11), (5, 4)])
def test_a_growing_pool_prefetches_less_than_the_delay_of_the_predictor(
    monkeypatch: pytest.MonkeyPatch, delay: int, in_flight: int
) -> None:
    selection = {"rule": "predicted", "predictor_delay": delay, "probe_images": 4}
    nodes = {"trainers": 1, "views": 8}
    scene = Scene(monkeypatch, num_workers=9, nodes=nodes, selection=selection, batches_in_flight="auto")
    scene.cpus["late"] = 1
    scene.poll(4.0)
    assert len(scene.members) == 9
    assert scene.roster.batches_in_flight == in_flight


def test_workers_that_are_all_on_a_drained_node_move_to_a_node_that_joins_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, num_workers=2, nodes={"trainers": 1, "old": 2})
    scene.poll(4.0)
    scene.draining.add("old")
    scene.poll(20.0)
    assert scene.members == scene.living == {0, 1}
    scene.cpus["new"] = 3
    scene.poll(10.0)
    assert scene.members == scene.living == {2, 3}


def test_workers_that_ray_restarted_elsewhere_before_they_left_stay_and_the_pool_is_sized_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, num_workers=4, nodes={"trainers": 1, "old": 4})
    scene.draining.add("old")
    scene.poll(4.0)
    del scene.cpus["old"]
    scene.draining.clear()
    scene.cpus["new"] = 4
    scene.homes = dict.fromkeys(scene.homes, "new")
    scene.poll(20.0)
    assert scene.members == {0, 1, 2, 3}
    scene.poll(200.0)
    assert len(scene.members) == 1  # 0.5 render on average


@pytest.mark.parametrize("drains", [False, True])
def test_resources_of_a_trainer_that_died_are_kept_for_it(monkeypatch: pytest.MonkeyPatch, drains: bool) -> None:
    """The trainers wait, and the only free CPU is that of the trainer that died."""
    scene = Scene(monkeypatch, num_workers=1, nodes={"trainers": 2, "views": 1}, num_trainers=2)
    scene.waits_per_poll = 1.0
    scene.poll(40.0)
    assert any("view workers stay at 1" in message for message in scene.messages)
    del scene.trainers[1]
    if drains:
        scene.draining.add("views")
    scene.poll(60.0)
    assert scene.living == {0}
    scene.trainers[1] = "trainers"
    scene.cpus["more"] = 1
    scene.poll(20.0)
    assert scene.members == ({1} if drains else {0, 1})


def test_workers_that_start_when_a_trainer_dies_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, num_workers=1, nodes={"trainers": 2, "views": 2}, num_trainers=2)
    scene.waits_per_poll = 1.0
    monkeypatch.setattr(scene, "_place", lambda: None)  # the new worker is never up
    scene.poll(40.0)
    assert scene.living == {0, 1}
    del scene.trainers[1]
    scene.poll(20.0)
    assert scene.living == {0}


def test_a_roster_that_was_not_published_is_published_later_and_no_worker_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, num_workers=2, nodes={"trainers": 1, "old": 1, "new": 1})
    scene.poll()
    scene.draining.add(scene.homes["view-worker-0"])
    scene.failures.append(GetTimeoutError())
    with pytest.raises(GetTimeoutError):
        scene.poll()
    assert scene.members == {0, 1}
    scene.poll(4.0)
    assert scene.members == scene.living == {1}


def test_an_elastic_run_with_fewer_trainers_gives_workers_back_and_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"trainers": 2, "views": 8}
    scene = Scene(monkeypatch, num_workers=4, nodes=nodes, num_trainers=3, min_trainers=2)
    del scene.trainers[2]
    scene.num_ranks = 2
    scene.poll(120.0)
    size = len(scene.members)
    assert size < 4
    scene.waits_per_poll = 1.0
    scene.poll(60.0)
    assert len(scene.members) == size
    assert "a trainer is missing, has room for 0 more" in scene.messages[-1]


def test_a_worker_that_leaves_is_kept_while_no_trainer_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, num_workers=2, nodes={"old": 1, "new": 1})
    scene.trainers.clear()
    scene.draining.add("old")
    scene.poll(290.0)
    assert scene.members == {1}
    assert scene.living == {0, 1}
    scene.poll(20.0)
    assert scene.living == {1}


def test_a_stream_survives_an_answer_that_a_cut_link_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, num_workers=1, nodes={"trainers": 1, "views": 1})
    answers: list[RayError | Unread[Roster]] = [ActorUnavailableError("the link was cut", None), Unread(scene.roster)]

    def get(_call: object) -> Roster:
        answer = answers.pop(0)
        if isinstance(answer, RayError):
            raise answer
        return answer

    monkeypatch.setattr(board_module, "ray", SimpleNamespace(get=get, wait=lambda calls, timeout: (calls, [])))
    poster = RosterPoster(SimpleNamespace(exchange=_Method(scene.board.exchange)))

    def exchange() -> Roster | None:
        return poster(lambda: scene._report(0))

    assert [exchange() for _ in range(3)] == [None, None, None]
    assert exchange() is scene.roster


def test_restarts_of_ended_workers_count_and_a_closed_pool_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, num_workers=3, nodes={"trainers": 1, "views": 3})
    scene.num_restarts = 2
    scene.pool.end([1])
    assert scene.pool.num_restarts_of_ended == 2
    assert scene.pool.actor_ids() == ("view-worker-0", "view-worker-2")
    assert list(scene.pool.start(1)) == [3]
    scene.pool.close()
    assert scene.pool.start(1) == {}
    scene.pool.end([0])
    assert scene.actors == []
