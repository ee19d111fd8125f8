"""How a pool sizes itself: loads by hand, each rule of the controller, and whole runs on paper."""

from collections.abc import Callable

import pytest

from benchmarks.pool_simulation import History, Sizing, simulate_sizing
from hvp_ray.stream.pool_control import CAPACITY_FACTOR, MOST_WAITING, Load, LoadMeter, PoolController
from hvp_ray.stream.roster import StreamReport


def _report(rank: int, at_seconds: float, *, stream: str = "a", version: int = 1, **values: object) -> StreamReport:
    measured: dict[str, object] = {"num_batches": 0, "worker_seconds": 0.0, "waits": {}}
    return StreamReport(
        stream=f"{stream}{rank}",
        rank=rank,
        num_ranks=2,
        node_id="node",
        version=version,
        at_seconds=at_seconds,
        in_use=frozenset(),
        down=frozenset(),
        lost=frozenset(),
        **(measured | values),  # type: ignore[arg-type]
    )


def _load(wait_fraction: float, busy_workers: float) -> Load:
    return Load(wait_fraction=wait_fraction, busy_workers=busy_workers)


def test_load_merges_the_waits_of_all_ranks_by_step() -> None:
    """In ten seconds rank 0 waits 1 s for step 5, and rank 1 waits 0.4 s for step 5 and 0.5 s for step 6: 1.5 s in all.

    Clocks of the ranks differ. Their workers worked 10 s and 20 s.
    """
    meter = LoadMeter(window_seconds=10.0)
    meter.restart(1, num_settling=0)
    for rank, clock in ((0, 0.0), (1, 1000.0)):
        meter.add(_report(rank, clock))
    assert meter.loads() == []
    meter.add(_report(0, 10.0, worker_seconds=10.0, waits={5: 1.0}))
    assert meter.loads() == []
    meter.add(_report(1, 1005.0, worker_seconds=8.0, waits={5: 0.2}))
    meter.add(_report(1, 1010.0, worker_seconds=20.0, waits={5: 0.4, 6: 0.5}))
    (load,) = meter.loads()
    assert load.wait_fraction == pytest.approx(0.15)
    assert load.busy_workers == pytest.approx(3.0)
    assert load.demand == pytest.approx(3.0 / 0.85)
    meter.add(_report(0, 20.0, worker_seconds=10.0))
    meter.add(_report(1, 1020.0, worker_seconds=30.0))
    newest, before = meter.loads()
    assert newest == _load(0.0, 1.0)
    assert before == load


def test_load_begins_when_the_batches_of_the_old_pool_are_taken() -> None:
    """Reports of an older roster do not count, nor does a trainer that restarts continue the load of the one before."""
    meter = LoadMeter(window_seconds=10.0)
    meter.restart(2, num_settling=4)
    for rank in (0, 1):
        meter.add(_report(rank, 0.0, version=1, num_batches=50))
        meter.add(_report(rank, 10.0, version=2, num_batches=60))
        meter.add(_report(rank, 20.0, version=2, num_batches=63))
        meter.add(_report(rank, 25.0, version=2, num_batches=64))
    assert meter.loads() == []
    for rank in (0, 1):
        meter.add(_report(rank, 35.0, version=2, num_batches=80))
    assert meter.loads() == [_load(0.0, 0.0)]
    meter.add(_report(0, 40.0, stream="b", version=2, num_batches=0))
    assert meter.loads() == []


def test_pool_grows_to_the_demand_but_doubles_at_most() -> None:
    controller = PoolController(100)
    decision = controller.decide(size=4, room=50, loads=[_load(0.2, 4.0)], now=0.0)
    assert decision is not None
    assert decision.size == 6  # 1.2 x 4 / 0.8
    assert decision.reason == (
        "trainers waited 20.0% of the last 20 s, 4.0 rendered on average, the cluster has room for 50 more"
    )
    assert _size(PoolController(100), 4, 50, [_load(0.9, 4.0)]) == 8
    assert _size(PoolController(100), 4, 1, [_load(0.9, 4.0)]) == 5
    assert _size(PoolController(7), 4, 50, [_load(0.9, 4.0)]) == 7
    assert _size(PoolController(100), 4, 0, [_load(0.9, 4.0)]) == 4
    assert _size(PoolController(100), 4, 50, [_load(0.05, 2.0)]) == 5
    assert PoolController(100).decide(size=4, room=50, loads=[_load(MOST_WAITING, 4.0)], now=0.0) is None
    assert PoolController(100).decide(size=4, room=50, loads=[], now=0.0) is None


def _size(controller: PoolController, size: int, room: int, loads: list[Load], now: float = 0.0) -> int | None:
    decision = controller.decide(size=size, room=room, loads=loads, now=now)
    return None if decision is None else decision.size


def test_pool_shrinks_to_the_largest_demand_of_three_windows_but_halves_at_most() -> None:
    assert _size(PoolController(100), 20, 0, [_load(0.0, 9.0), _load(0.005, 12.0), _load(0.0, 8.0)]) == 15
    assert _size(PoolController(100), 20, 0, [_load(0.0, 2.0)] * 3) == 10
    assert _size(PoolController(100), 2, 0, [_load(0.0, 0.1)] * 3) == 1
    assert _size(PoolController(100), 1, 0, [_load(0.0, 0.1)] * 3) is None
    assert _size(PoolController(100), 20, 0, [_load(0.0, 2.0)] * 2) is None
    assert _size(PoolController(100), 20, 0, [_load(0.0, 2.0), _load(0.015, 2.0), _load(0.0, 2.0)]) is None
    assert _size(PoolController(100), 20, 0, [_load(0.0, 16.0)] * 3) is None  # 20 - 20
    assert _size(PoolController(100), 40, 0, [_load(0.0, 32.0)] * 3) is None  # one of 40 is not worth it


def test_size_at_which_trainers_waited_is_avoided_for_half_an_hour() -> None:
    """Sending takes half of a worker's time here, so the demand that is measured is half of what is needed."""
    controller = PoolController(100)
    assert _size(controller, 2, 50, [_load(0.1, 0.9)]) == 3
    assert _size(controller, 3, 50, [_load(0.0, 1.0)] * 3, now=100.0) is None
    assert _size(controller, 3, 50, [_load(0.0, 0.4)] * 3, now=100.0) == 2  # the load fell
    assert _size(controller, 3, 50, [_load(0.0, 1.0)] * 3, now=1900.0) == 2


def test_growth_that_does_not_help_is_undone_and_not_tried_again_soon() -> None:
    controller = PoolController(100)
    slow_link = _load(0.3, 3.0)
    assert _size(controller, 4, 50, [slow_link]) == 6
    undone = controller.decide(size=6, room=50, loads=[_load(0.29, 3.1)], now=50.0)
    assert undone is not None
    assert undone.size == 4
    assert "29.0% of the last 20 s with 6, and 30.0% with 4, so more do not help" in undone.reason
    assert _size(controller, 4, 50, [slow_link], now=349.0) is None
    assert _size(controller, 4, 50, [slow_link], now=351.0) == 6
    assert _size(controller, 6, 50, [slow_link], now=400.0) == 4
    assert _size(controller, 4, 50, [slow_link], now=999.0) is None  # twice as long
    assert _size(controller, 4, 50, [slow_link], now=1001.0) == 6


def test_growth_counts_as_help_if_more_workers_render_although_the_load_rose_meanwhile() -> None:
    controller = PoolController(100)
    assert _size(controller, 4, 50, [_load(0.03, 4.0)]) == 5
    assert _size(controller, 5, 50, [_load(0.5, 5.0)], now=50.0) == 10


def _check(history: History, sizing: Sizing, phases: list[tuple[float, float]], settling: float) -> None:
    """In each phase, once settled: little waiting, no more workers than needed, and at most one more change."""
    for begin, end in phases:
        sizes = history.sizes_within(begin + settling, end)
        demand = sizing.demand(begin)
        assert history.wait_fraction(begin + settling, end) < MOST_WAITING, (begin, history.reasons)
        assert max(sizes) <= max(1.5 * CAPACITY_FACTOR * demand, demand + 2.0), (begin, history.reasons)
        assert len(sizes) <= 2, (begin, history.reasons)


def _phases(low: float, high: float) -> Callable[[float], float]:
    """Rendering becomes dearer at 600 s and cheaper at 1,500 s."""
    return lambda now: high if 600.0 <= now < 1500.0 else low


@pytest.mark.parametrize(
    ("num_trainers", "num_workers", "low", "high"),
    [(1, 8, 0.3, 2.5), (1, 1, 1.0, 6.0), (4, 1, 1.0, 3.0), (8, 40, 0.5, 2.0)],
)
def test_pool_follows_the_load_without_oscillating(
    num_trainers: int, num_workers: int, low: float, high: float
) -> None:
    sizing = Sizing(num_trainers=num_trainers, num_workers=num_workers, render_seconds=_phases(low, high))
    history = simulate_sizing(sizing, seconds=2400.0)
    _check(history, sizing, [(0.0, 600.0), (600.0, 1500.0), (1500.0, 2400.0)], settling=350.0)


def test_256_workers_follow_64_trainers() -> None:
    """The load needs 102, then 205 and 102 workers."""
    sizing = Sizing(num_trainers=64, num_workers=64, render_seconds=lambda now: 3.2 if 300.0 <= now < 700.0 else 1.6)
    history = simulate_sizing(sizing, seconds=1100.0)
    _check(history, sizing, [(0.0, 300.0), (300.0, 700.0), (700.0, 1100.0)], settling=200.0)
    assert max(size for _, size in history.sizes) > 200


def test_pool_grows_when_a_node_joins_and_not_behind_a_slow_link() -> None:
    sizing = Sizing(num_trainers=2, num_workers=2, render_seconds=lambda _: 2.0, room=lambda t: 2 if t < 400 else 8)
    history = simulate_sizing(sizing, seconds=1000.0)
    assert history.sizes_within(0.0, 400.0) == [2]
    assert history.wait_fraction(100.0, 400.0) > 0.4
    assert history.wait_fraction(600.0, 1000.0) < MOST_WAITING
    linked = Sizing(num_trainers=1, num_workers=3, render_seconds=lambda _: 1.0, bottleneck_seconds=1.3)
    history = simulate_sizing(linked, seconds=2000.0)
    assert max(size for _, size in history.sizes) <= 6
    assert history.sizes[-1][1] <= 3


def test_a_trainer_that_restarts_while_a_roster_settles_delays_the_load_and_does_not_stop_it() -> None:
    meter = LoadMeter(window_seconds=10.0)
    meter.restart(2, num_settling=4)
    for rank in (0, 1):
        meter.add(_report(rank, 0.0, version=2, num_batches=9000))
    for at_seconds, num_batches in ((5.0, 0), (10.0, 4), (15.0, 8), (25.0, 12)):
        for rank in (0, 1):
            meter.add(_report(rank, at_seconds, stream="b", version=2, num_batches=num_batches))
    assert meter.loads() == [_load(0.0, 0.0)]


def test_small_growths_in_a_row_are_judged_together() -> None:
    """Behind a slow link 16 workers grow to 18 at most, and return to 16."""
    linked = Sizing(num_trainers=1, num_workers=16, render_seconds=lambda _: 1.0, bottleneck_seconds=1.3)
    history = simulate_sizing(linked, seconds=3000.0)
    assert max(size for _, size in history.sizes) <= 18
    assert history.sizes_within(1000.0, 3000.0).count(16) >= 1


def test_view_finishers_are_the_first_suspect_if_there_are_any() -> None:
    controller = PoolController(100, has_finishers=True)
    assert _size(controller, 4, 50, [_load(0.3, 3.0)]) == 6
    undone = controller.decide(size=6, room=50, loads=[_load(0.3, 3.0)], now=50.0)
    assert undone is not None
    assert "more do not help. The view finishers may be too few (cluster.finishers_per_trainer)" in undone.reason
