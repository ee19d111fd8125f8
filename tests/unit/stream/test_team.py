"""Whom a trainer asks: the least busy, in turn; and trainers that run in step burden all workers alike."""

from collections import Counter

import pytest

from hvp_ray.stream.team import Team


def test_least_busy_is_asked_in_turn_and_the_dead_are_not() -> None:
    team = Team("view worker", ["a", "b", "c"])
    asked = []
    for _ in range(4):
        member = team.least_busy()
        assert member is not None
        member.num_calls += 1
        asked.append(member.handle)
    assert asked == ["a", "b", "c", "a"]
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
    assert Team("view finisher", []).least_busy() is None


@pytest.mark.parametrize(("num_workers", "num_trainers"), [(256, 64), (12, 4), (3, 3), (7, 1), (4, 8)])
def test_trainers_that_run_in_step_burden_all_workers_alike(num_workers: int, num_trainers: int) -> None:
    """Each trainer asks once a step. However long one looks, no worker was asked more than its share and one call."""
    teams = [Team("view worker", range(num_workers), rank=r, num_ranks=num_trainers) for r in range(num_trainers)]
    asked: Counter[int] = Counter()
    for step in range(1, 2 * num_workers):
        for team in teams:
            member = team.least_busy()
            assert member is not None
            asked[member.handle] += 1
        share = step * num_trainers / num_workers
        assert max(asked.values()) <= share + 1.0
