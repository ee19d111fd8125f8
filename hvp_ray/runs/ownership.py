"""One owner per run: the claim of an attempt, as a file in the run's folder or bucket. A comparison is owned likewise.

`<run>/owner/00000003-<16 hex digits>.json` is the claim of attempt 3. Its owner, which is trainer 0, rewrites it every few
seconds. Whoever wants the run waits until the newest claim may be succeeded (`_Waiting`), and claims the next number.

Two that claim at once: each writes a claim, then lists all. Whoever sees another claim of this number or a higher one
withdraws and tries again. The one that wrote last sees the other, so at most one owns a number, and nothing but a store that
lists what was written is needed (local disks, S3, GCS, Azure).

An owner that was paused or cut off, and was succeeded, finds the higher number: within seconds by its thread, and before
whatever it commits (`check`). A request that is under way at that moment may still arrive. It does no damage: segments of the
log and files of checkpoints carry the attempt's number (`run_log.py`, `checkpoint.py`), and a manifest that comes late names
files of its own attempt at the same step. No clock is compared with another machine's.
"""

import json
import logging
import os
import random
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hvp_ray.errors import CheckpointError, LostRunError, first_line
from hvp_ray.files import Folder

logger = logging.getLogger(__name__)

FOLDER = "owner"
_BEAT_SECONDS = 5.0
_STALE_SECONDS = 30.0
"""A claim that stays unchanged for so long is of an owner that died, is paused or is cut off."""
_PATIENCE_SECONDS = 60.0
"""Until an owner that lives is believed to go on. One that was killed may take a while to exit."""

_POLL_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 5.0
"""Between two tries of processes that claim at once."""

_NAME = re.compile(rf"{FOLDER}/(\d{{8}})-[0-9a-f]{{16}}\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Owned:
    """Words for what is owned, in messages."""

    noun: str
    work: str
    """What its owner does, `is ...ing`."""
    other: str
    """Option that names another one."""
    again: str
    """How it is continued."""


A_RUN = Owned(noun="run", work="training", other="--run.name", again="start the run again with its name to resume it")
A_COMPARISON = Owned(
    noun="comparison", work="doing", other="--comparison NAME", again="start the comparison again to continue it"
)


class RunClaim:
    """The claim of this process on a run. A context manager; leaving it lets the next owner in at once."""

    def __init__(self, location: str, *, job: str, owned: Owned = A_RUN) -> None:
        """Wait for the run to be free, and claim it.

        Args:
            location: the run's folder, path or URI.
            job: token of the job of this process. A later attempt of one job succeeds the earlier one without waiting.
            owned: what is claimed.

        Raises:
            CheckpointError: another process is training the run, or the storage failed.
        """
        self._owned = owned
        self._folder = Folder(location)
        self._once = Folder(location, pauses=())  # without retries
        self._job = job
        self._loss: LostRunError | None = None
        self._beats = 0
        self._has_ended = threading.Event()
        try:
            self.number, self._name = self._claim()
        except OSError as error:
            raise self._cannot_be("claimed", error) from error
        self._thread = threading.Thread(target=self._keep, name="claim on the run", daemon=True)
        self._thread.start()

    def raise_if_lost(self) -> None:
        """Raise if the thread has found a successor; costs nothing.

        Raises:
            LostRunError: see `check`.
        """
        if self._loss is not None:
            raise self._loss

    def check(self) -> None:
        """Ask the storage whether this process still owns the run. Several threads may call this.

        Raises:
            LostRunError: another process has taken the run over.
            CheckpointError: the storage failed.
        """
        self.raise_if_lost()
        try:
            self._look_for_successor(self._folder)
        except OSError as error:
            raise self._cannot_be("checked for another owner", error) from error
        self.raise_if_lost()

    def is_lost(self) -> bool:
        """Tell whether another process is known to have taken the run over; a storage that fails does not tell."""
        try:
            self._look_for_successor(self._once)
        except OSError:
            return self._loss is not None
        return self._loss is not None

    def __enter__(self) -> "RunClaim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the claim. Its file stays, so that an owner that was paused finds it."""
        self._has_ended.set()
        self._thread.join(timeout=_BEAT_SECONDS)
        if self._loss is None:
            try:
                self._write(self._once, self._name)
            except OSError as failure:
                logger.warning("the claim on %s could not be ended: %s", self._folder.location, first_line(failure))

    def _claim(self) -> tuple[int, str]:
        waiting, longest_pause = _Waiting(self._folder.location, self._owned), _POLL_SECONDS
        while True:
            claims = self._claims(self._folder)
            highest = max(claims.values(), default=0)
            newest = [name for name, number in claims.items() if number == highest]
            contents = [content for name in newest if (content := self._folder.read(name)) is not None]
            if len(contents) < len(newest):
                continue  # one was withdrawn since it was listed, and the list may have grown
            if not waiting.may_succeed(contents, job=self._job):
                time.sleep(_POLL_SECONDS)
                continue
            name = f"{FOLDER}/{highest + 1:08d}-{secrets.token_hex(8)}.json"
            self._write(self._folder, name)
            claims = self._claims(self._folder)
            if any(number > highest for other, number in claims.items() if other != name):
                self._folder.delete(name)
                longest_pause = min(2.0 * longest_pause, _LONGEST_PAUSE_SECONDS)
                time.sleep(random.uniform(0.0, longest_pause))
                continue
            for old in claims:
                if old != name:
                    self._folder.delete(old)
            return highest + 1, name

    @staticmethod
    def _claims(folder: Folder) -> dict[str, int]:
        """Return the number of each claim by its name."""
        found = ((name, _NAME.fullmatch(name)) for name in folder.names(FOLDER))
        return {name: int(match[1]) for name, match in found if match is not None}

    def _write(self, folder: Folder, name: str) -> None:
        claim = {
            "job": self._job,
            "host": socket.gethostname(),
            "process": _Process.this().to_dict(),
            "beat": self._beats,
            "ended": self._has_ended.is_set(),
        }
        folder.write(name, (json.dumps(claim) + "\n").encode())

    def _keep(self) -> None:
        """Renew the claim until it ends or is lost."""
        is_failing = False
        while not self._has_ended.wait(_BEAT_SECONDS):
            try:
                self._look_for_successor(self._once)
                if self._loss is not None:
                    return
                self._beats += 1
                if not self._has_ended.is_set():
                    self._write(self._once, self._name)
                is_failing = False
            except OSError as error:
                if not is_failing:
                    logger.warning(
                        "the claim on %s could not be renewed: %s; retrying", self._folder.location, first_line(error)
                    )
                is_failing = True

    def _look_for_successor(self, folder: Folder) -> None:
        higher = [(number, name) for name, number in self._claims(folder).items() if number > self.number]
        if higher and self._loss is None:
            number, name = max(higher)
            successor = _parse(folder.read(name))
            loss = LostRunError(
                f"{_describe(successor)} has taken over the {self._owned.noun} {self._folder.location} as attempt {number}, "
                f"because this process, attempt {self.number}, was paused, cut off or replaced. The {self._owned.noun} goes "
                f"on there from its newest checkpoint, and this process ends. Nothing has to be done"
            )
            loss.same_job = successor.get("job") == self._job
            self._loss = loss

    def _cannot_be(self, done: str, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the {self._owned.noun} {self._folder.location} could not be {done}: {first_line(error)}. Its checkpoints are "
            f"untouched. Repair the storage or make room, then {self._owned.again}"
        )


class _Waiting:
    """Watches the newest claims of a run while another process may own it."""

    def __init__(self, location: str, owned: Owned) -> None:
        self._location = location
        self._owned = owned
        self._started_at = time.monotonic()
        self._polled_at = self._started_at
        self._seen: list[bytes] = []
        self._unchanged_seconds = 0.0
        self._was_shown = False

    def may_succeed(self, newest: list[bytes], *, job: str) -> bool:
        """Tell whether a process of `job` may claim the next number after the claims of these contents.

        Raises:
            CheckpointError: the owner lives and has gone on for long enough.
        """
        now = time.monotonic()
        # Of a request that took long, an outage for instance, only a part counts: the owner could not write either.
        self._unchanged_seconds += min(now - self._polled_at, 4.0 * _POLL_SECONDS)
        self._polled_at = now
        if newest != self._seen:
            self._seen, self._unchanged_seconds = newest, 0.0
        owners = [_parse(content) for content in newest]
        blocking = [owner for owner in owners if not _is_free(owner, job)]
        if not blocking or self._unchanged_seconds >= _STALE_SECONDS:
            return True
        owner = _describe(blocking[0])
        if now - self._started_at >= _PATIENCE_SECONDS and self._unchanged_seconds < _STALE_SECONDS / 2.0:
            raise CheckpointError(
                f"{owner} is {self._owned.work} the {self._owned.noun} {self._location}. A {self._owned.noun} has one owner "
                f"at a time. Wait until it ends or end it, or take another {self._owned.other}"
            )
        if not self._was_shown:
            logger.warning(
                "%s may still be %s the %s %s; waiting %.0f s to see whether it lives",
                owner,
                self._owned.work,
                self._owned.noun,
                self._location,
                _STALE_SECONDS,
            )
            self._was_shown = True
        return False


@dataclass(frozen=True, slots=True)
class _Process:
    """A process, so that a later one on the same machine can tell whether it lives."""

    machine: str
    """Boot of the machine and namespace of process ids; empty where /proc does not tell."""
    id: int
    start: str
    """Time of its start in clock ticks since the boot."""

    @staticmethod
    def this() -> "_Process":
        return _Process(_machine(), os.getpid(), _start_of(os.getpid()) or "")

    def to_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "id": self.id, "start": self.start}

    def is_dead(self) -> bool:
        """Tell whether it is known that the process has ended."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            return _start_of(self.id) != self.start
        except PermissionError:
            return False  # a process of another user, which /proc does not show


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(process_id: int) -> str | None:
    """Return when a process started; None: there is none, or it has ended and its parent has not noticed.

    Raises:
        PermissionError: it lives, and its start is hidden.
    """
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return None
        raise PermissionError(f"/proc/{process_id} is hidden") from None
    return None if fields[0] in "ZX" else fields[19]


def _parse(content: bytes | None) -> dict[str, Any]:
    """Return a claim; empty: it is none."""
    try:
        claim = json.loads(content or b"")
    except ValueError:
        return {}
    return claim if isinstance(claim, dict) else {}


def _is_free(claim: dict[str, Any], job: str) -> bool:
    """Tell whether the owner has ended, or gives way because it is of the same job."""
    if claim.get("ended") is True or claim.get("job") == job:
        return True
    try:
        return _Process(**claim["process"]).is_dead()
    except (KeyError, TypeError):
        return False


def _describe(claim: dict[str, Any]) -> str:
    process = claim.get("process")
    number = process.get("id") if isinstance(process, dict) else None
    return f"process {number} on {claim.get('host')}" if number is not None else "another process"
