"""A trainer chooses the least busy actor, in turn; trainers that run in step load all workers equally."""

from collections import Counter

import pytest

from hvp_ray.stream.team import Team


def test_least_busy_is_chosen_in_turn_and_the_dead_are_not() -> None:
    team = Team("view worker", dict(enumerate("abc")))
    called = []
    for _ in range(4):
        member = team.least_busy()
        assert member is not None
        member.num_calls += 1
        called.append(member.handle)
    assert called == ["a", "b", "c", "a"]
    team.members[0].num_calls = 0
    team.members[2].is_up = False
    first = team.least_busy()
    assert first is team.members[0]
    assert team.least_busy(other_than=[first]) is team.members[1]
    assert team.describe() == "2 of 3 view workers are up"
    team.members[2].lost = "it could not start: no images"
    assert team.describe() == "2 of 3 view workers are up (view worker 2 is lost: it could not start: no images)"
    team.members[0].is_up = team.members[1].is_up = False
    assert team.least_busy() is None
    assert Team("view finisher", {}).least_busy() is None


@pytest.mark.parametrize(("num_workers", "num_trainers"), [(256, 64), (12, 4), (3, 3), (7, 1), (4, 8)])
def test_trainers_that_run_in_step_load_all_workers_equally(num_workers: int, num_trainers: int) -> None:
    """Each trainer makes one call a step. At any time no worker has had more than its share and one call."""
    workers = dict(enumerate(range(num_workers)))
    teams = [Team("view worker", workers, rank=r, num_ranks=num_trainers) for r in range(num_trainers)]
    called: Counter[int] = Counter()
    for step in range(1, 2 * num_workers):
        for team in teams:
            member = team.least_busy()
            assert member is not None
            called[member.handle] += 1
        share = step * num_trainers / num_workers
        assert max(called.values()) <= share + 1.0


def test_member_that_leaves_finishes_its_calls_and_one_that_joins_is_chosen_in_its_turn() -> None:
    team = Team("view worker", {0: "a", 1: "b"})
    for _ in range(4):
        member = team.least_busy()
        assert member is not None
        member.num_calls += 1
    leaving = team.members[0]
    team.follow({1: "b", 2: "c"})
    assert [member.handle for member in team.members] == ["b", "c"]
    assert team.in_use() == {0, 1}
    chosen = [team.least_busy() for _ in range(3)]
    assert [member.handle for member in chosen if member] == ["b", "c", "c"]
    leaving.num_calls = 0
    assert team.in_use() == {1}


def test_members_that_join_are_not_chosen_by_all_trainers_at_once() -> None:
    """64 trainers with 4 calls each learn of 64 more workers. Their next requests are spread over the workers."""
    teams = [Team("view worker", {i: i for i in range(64)}, rank=rank, num_ranks=64) for rank in range(64)]
    for team in teams:
        for _ in range(4):
            member = team.least_busy()
            assert member is not None
            member.num_calls += 1
        team.follow({i: i for i in range(128)})
    called: Counter[int] = Counter()
    for team in teams:
        member = team.least_busy()
        assert member is not None
        called[member.handle] += 1
    assert max(called.values()) <= 2
