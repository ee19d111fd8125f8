"""Pack with many processes: assign tasks, report progress, survive or report the death of one. `packing.py` does a task."""

import fcntl
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.packing import (
    PackingPlan,
    PackResult,
    Target,
    check_unreadable,
    clean_up,
    commit,
    open_for_packing,
    pack_task,
    plan_packing,
)
from hvp_ray.data.shard_format import Manifest
from hvp_ray.data.source import Source
from hvp_ray.errors import ConfigError, DataError, LabelError, first_line
from hvp_ray.files import is_uri

logger = logging.getLogger(__name__)

Show = Callable[[int, int], None]
"""Called a few times a second with the number of images done, and of all images."""

_SHOW_SECONDS = 0.25


def pack(
    location: str,
    target_location: str,
    config: DataConfig,
    *,
    shard_mib: int,
    num_workers: int,
    is_strict: bool,
    show: Show = lambda _done, _total: None,
) -> PackResult:
    """Pack a source, or continue an interrupted packing.

    Args:
        location: path or URI of the source; see `DataConfig.source`.
        target_location: folder for the shards, a path or a URI.
        config: columns and limits.
        shard_mib: a shard is closed at this many MiB of images.
        num_workers: processes. The result does not depend on it.
        is_strict: stop at the first unreadable image.
        show: progress.

    Raises:
        ConfigError: the target cannot be used, or holds something else.
        DataError: the source cannot be used, too many images are unreadable, or a process died.
    """
    source, root = open_for_packing(location, config)
    plan = plan_packing(source, config, shard_mib=shard_mib, root=root)
    target = Target(target_location)
    try:
        with _claimed(target_location):
            manifest = target.begin(plan)
            if manifest is not None:
                clean_up(target)
                return _result(manifest, was_complete=True)
            labels, class_names = _load_labels(source)
            done = target.finished_tasks()
            job = _Job(location=location, target=target_location, config=config, plan=plan, is_strict=is_strict)
            _run_tasks(job, source, labels, done, num_workers, show)
            manifest = commit(
                plan,
                target,
                class_names=class_names,
                max_unreadable_fraction=config.max_unreadable_fraction,
            )
    except OSError as error:
        raise DataError(
            f"packing stopped: {first_line(error)}; check source and target, then give the same command again to continue"
        ) from error
    return _result(manifest, was_complete=False)


def _load_labels(source: Source) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Return labels and class names. None: there are no labels; a warning has the reason."""
    try:
        return source.load_labels(), source.load_class_names()
    except LabelError as error:
        logger.warning("images are packed without labels: %s", error)
        return None, ()


def _result(manifest: Manifest, *, was_complete: bool) -> PackResult:
    return PackResult(
        num_images=manifest.num_images,
        num_unreadable=manifest.num_unreadable,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.bytes for shard in manifest.shards),
        was_complete=was_complete,
    )


@contextmanager
def _claimed(location: str) -> Iterator[None]:
    """Refuse a second process that packs into the same folder. Two may share a bucket: they write the same whole files."""
    if is_uri(location):
        yield
        return
    folder = Path(location).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    claim = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"TARGET {location}: another hvp-ray pack is packing there; wait for it") from error
        yield
    finally:
        os.close(claim)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """Arguments of `pack`, and its plan, for every process. Each opens source and target itself."""

    location: str
    target: str
    config: DataConfig
    plan: PackingPlan
    is_strict: bool


def _run_tasks(
    job: _Job,
    source: Source,
    labels: NDArray[np.int64] | None,
    done: dict[int, tuple[int, int]],
    num_workers: int,
    show: Show,
) -> None:
    """Run the tasks that are not `done` (number -> images packed, images left out)."""
    starts = job.plan.task_starts
    missing = [number for number in range(len(starts) - 1) if number not in done]
    num_left_out = sum(left_out for _, left_out in done.values())
    num_seen = num_left_out + sum(packed for packed, _ in done.values())
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    board = context.Array("q", 2 * num_workers, lock=False)
    turn = context.Value("i", 0)
    begun_with = num_seen
    executor = ProcessPoolExecutor(
        min(num_workers, len(missing)), mp_context=context, initializer=_begin, initargs=(job, board, turn)
    )
    # As `ProcessPoolExecutor.terminate_workers` does in Python 3.14. The caller may have other child processes.
    processes = executor._processes
    under_way: set[Future[tuple[int, int]]] = set()
    try:
        pending = iter(missing)
        while True:
            while len(under_way) < 2 * num_workers and (number := next(pending, None)) is not None:
                part = None if labels is None else labels[starts[number] : starts[number + 1]]
                under_way.add(executor.submit(_do_task, number, part))
            if not under_way:
                break
            finished, under_way = wait(under_way, timeout=_SHOW_SECONDS, return_when=FIRST_COMPLETED)
            for future in finished:
                packed, left_out = future.result()
                num_seen, num_left_out = num_seen + packed + left_out, num_left_out + left_out
            check_unreadable(num_left_out, num_seen, job.config.max_unreadable_fraction)
            show(begun_with + sum(board[0::2]), source.num_samples)
        executor.shutdown()
    except BrokenProcessPool as error:
        in_flight = ", ".join(source.describe(sample_id) for sample_id in board[1::2])
        raise DataError(
            f"a process was killed, by the system for its memory (use fewer --workers) or by an image that crashes the "
            f"decoder; these images were in flight: {in_flight}. Give the same command again to continue"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in list(processes.values()):
            process.terminate()


_state: dict[str, Any] = {}
"""State of a pool process."""


def _begin(job: _Job, board: Any, turn: Any) -> None:
    """Set up a pool process. It ends with its parent, which also handles the user's interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True).start()
    with turn.get_lock():
        slot = turn.value
        turn.value += 1
    _state.update(job=job, board=board, slot=slot)


def _do_task(number: int, labels: NDArray[np.int64] | None) -> tuple[int, int]:
    job, board, slot = _state["job"], _state["board"], _state["slot"]
    if "source" not in _state:
        source, _ = open_for_packing(job.location, job.config)
        if source.fingerprint() != job.plan.source_fingerprint:
            raise DataError(
                f"{job.location} changed while it was packed; give the command again when nothing writes to it"
            )
        _state.update(source=source, target=Target(job.target))

    def report(num_images: int, sample_id: int) -> None:
        board[2 * slot] += num_images
        board[2 * slot + 1] = sample_id

    return pack_task(
        _state["source"],
        job.plan,
        _state["target"],
        number,
        labels=labels,
        is_strict=job.is_strict,
        report=report,
    )
