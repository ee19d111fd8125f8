"""A stop, requested by the first signal, by the second at once, or by another thread."""

import signal
import threading
from types import SimpleNamespace

import pytest
import ray

from hvp_ray.launch.driver import _unless_lost
from hvp_ray.launch.stop import RayProcesses, StoppedError, StopRequest, stop_on_signals
from hvp_ray.stream import connect


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks_and_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop_on_signals(stop):
        signal.raise_signal(number)
        assert stop.is_asked
        assert not stop.is_overdue
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_earlier_deadline_stays() -> None:
    stop = StopRequest()
    assert not stop.is_asked
    stop.ask(patience_seconds=-1.0)
    stop.ask()
    assert stop.is_overdue


def test_another_thread_receives_no_signals_and_changes_no_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with stop_on_signals(StopRequest()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    ("dead", "is_lost"),
    [(["log_monitor", "dashboard"], False), (["log_monitor", "raylet"], True), (["gcs_server"], True)],
)
def test_only_processes_that_ray_cannot_work_without_end_the_run(
    dead: list[str], is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without other processes Ray still answers: trainers write a checkpoint, and the driver ends the actors."""
    node = SimpleNamespace(dead_processes=lambda: [(name, None) for name in dead])
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    monkeypatch.setattr(connect, "_connection", connect._Connection(is_ours=True))
    stop = StopRequest()
    stop.ask()
    processes = RayProcesses(stop)
    if is_lost:
        with pytest.raises(StoppedError, match=f"stopped together with Ray .{', '.join(dead)} ended"):
            processes.check(patience_seconds=0.0)
    else:
        processes.check(patience_seconds=0.0)
    ended: list[str] = []
    _unless_lost(ended.append, "pool")
    assert ended == ([] if is_lost else ["pool"])
