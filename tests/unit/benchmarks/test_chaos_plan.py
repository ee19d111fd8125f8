"""Plans of `make chaos`: replayable, and of kinds that it can make."""

from benchmarks.chaotic.faults import _FAULTS
from benchmarks.chaotic.plan import KINDS, Event, draw_plan

SLOW = frozenset({"link of the view host slow", "link of the trainer host slow"})


def plan(run: int, where: str = "disk", **other: frozenset[str]) -> list[Event]:
    return draw_plan(3, run, num_steps=100, num_events=40, where=where, **other)


def test_plan_is_replayable_and_differs_between_runs() -> None:
    assert plan(0) == plan(0)
    assert plan(0) != plan(1)


def test_events_come_in_the_order_of_steps_that_the_run_reaches() -> None:
    steps = [event.step for event in plan(0)]
    assert steps == sorted(steps)
    assert min(steps) >= 1
    assert max(steps) < 100


def test_durations_lie_in_the_bounds_of_their_kind() -> None:
    bounds = {kind.title: kind.seconds for kind in KINDS}
    for event in plan(0):
        least, most = bounds[event.kind]
        assert least <= event.seconds <= most


def test_kinds_that_cannot_be_made_leave_the_others_as_they_are() -> None:
    assert any(event.kind in SLOW for event in plan(0))
    assert plan(0, without=SLOW) == [event for event in plan(0) if event.kind not in SLOW]


def test_disks_fill_only_where_runs_are_on_a_disk_and_buckets_pause_only_where_they_are_in_one() -> None:
    drawn = {where: {e.kind for run in range(20) for e in plan(run, where)} for where in ("disk", "bucket")}
    titles = {kind.title for kind in KINDS}
    assert drawn["disk"] == titles - {"bucket paused"}
    assert drawn["bucket"] == titles - {"disk of the runs full"}


def test_every_kind_can_be_made() -> None:
    assert set(_FAULTS) == {kind.title for kind in KINDS}
