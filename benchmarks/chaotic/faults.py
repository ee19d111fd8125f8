"""How each kind of fault is made, and undone."""

import contextlib
import signal
from collections.abc import Callable
from functools import partial

import psutil

from benchmarks.chaotic.cluster import ChaosCluster
from benchmarks.chaotic.hosts import Host
from benchmarks.chaotic.plan import Event

Undo = Callable[[], None]
_CLOCK_SECONDS = 7200


class NoTargetError(Exception):
    """What would be disturbed is not there now."""


def impossible_kinds(cluster: ChaosCluster) -> dict[str, str]:
    """Return kinds that this machine cannot make, with the reason."""
    if cluster.services.slow_link():
        cluster.services.normal_link()
        return {}
    slow = ("link of the view host slow", "link of the trainer host slow")
    return dict.fromkeys(slow, "this kernel has neither netem nor tbf")


def begin(cluster: ChaosCluster, event: Event) -> Undo:
    """Let a fault begin; return what ends it.

    Raises:
        NoTargetError: what it disturbs is not there now.
    """
    return _FAULTS[event.kind](cluster, event.choice)


def _signal(processes: list[psutil.Process], choice: float, number: signal.Signals) -> psutil.Process:
    if not processes:
        raise NoTargetError
    process = processes[int(choice * len(processes))]
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess as error:
        raise NoTargetError from error
    return process


def _kill(processes: list[psutil.Process], choice: float) -> Undo:
    _signal(processes, choice, signal.SIGKILL)
    return _nothing


def _pause(processes: list[psutil.Process], choice: float) -> Undo:
    return partial(_resume, [_signal(processes, choice, signal.SIGSTOP)])


def _pause_all(processes: list[psutil.Process]) -> Undo:
    if not processes:
        raise NoTargetError
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    return partial(_resume, processes)


def _resume(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _kill_host(host: Host) -> Undo:
    host.kill()
    return _nothing


def _cut(host: Host) -> Undo:
    host.set_link("down")
    return partial(host.set_link, "up")


def _slow(host: Host) -> Undo:
    host.slow_link()
    return host.normal_link


def _shift_clock(host: Host, choice: float) -> Undo:
    host.set_clock(round((2 * choice - 1) * _CLOCK_SECONDS))
    return partial(host.set_clock, 0)


def _fill_store(cluster: ChaosCluster) -> Undo:
    process = cluster.fill_store()
    if process is None:
        raise NoTargetError

    def end() -> None:
        process.kill()
        process.wait()

    return end


def _fill_disk(cluster: ChaosCluster) -> Undo:
    return partial(cluster.fill_disk().unlink, missing_ok=True)


def _kill_mlflow(cluster: ChaosCluster) -> Undo:
    if not cluster.services.processes("mlflow"):
        raise NoTargetError
    cluster.services.kill("mlflow")
    return cluster.start_mlflow


def _nothing() -> None:
    pass


_FAULTS: dict[str, Callable[[ChaosCluster, float], Undo]] = {
    "view worker killed": lambda c, choice: _kill(c.view_workers(), choice),
    "view worker paused": lambda c, choice: _pause(c.view_workers(), choice),
    "view host killed": lambda c, _: _kill_host(c.views),
    "link of the view host cut": lambda c, _: _cut(c.views),
    "link of the view host slow": lambda c, _: _slow(c.views),
    "clock of the view host jumps": lambda c, choice: _shift_clock(c.views, choice),
    "raylet of the view host paused": lambda c, choice: _pause(c.views.processes("raylet/raylet"), choice),
    "object store of the view host full": lambda c, _: _fill_store(c),
    "trainer killed": lambda c, choice: _kill(c.trainers(), choice),
    "trainer paused": lambda c, choice: _pause(c.trainers(), choice),
    "trainer host killed": lambda c, _: _kill_host(c.trainer),
    "link of the trainer host cut": lambda c, _: _cut(c.trainer),
    "link of the trainer host slow": lambda c, _: _slow(c.trainer),
    "clock of the trainer host jumps": lambda c, choice: _shift_clock(c.trainer, choice),
    "driver killed": lambda c, _: _kill(c.head.processes("pipelines/pretrain.py"), 0.0),
    "head killed": lambda c, _: _kill_host(c.head),
    "MLflow paused": lambda c, _: _pause_all(c.services.processes("mlflow")),
    "MLflow killed": lambda c, _: _kill_mlflow(c),
    "disk of the runs full": lambda c, _: _fill_disk(c),
    "bucket paused": lambda c, _: _pause_all(c.services.processes("moto.server")),
}
"""Title of a kind -> what makes it, of the cluster and the event's choice."""
