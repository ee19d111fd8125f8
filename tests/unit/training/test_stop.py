"""A stop: asked for by the first signal, at once by the second, and by other threads."""

import signal
import threading

import pytest

from hvp_ray.training.stop import StopRequest, stop_on_signals


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


def test_earlier_deadline_stands() -> None:
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
