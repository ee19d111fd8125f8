"""One owner per run: on a disk and on S3, at most one process owns a run, and whoever loses it harms nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hvp_ray.errors import CheckpointError, LostRunError
from hvp_ray.files import Folder, join_uri, place_in
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.runs import ownership
from hvp_ray.runs.checkpoint import CheckpointStore, weights_digest
from hvp_ray.runs.ownership import RunClaim
from hvp_ray.training.trainee import Checkpoint
from tests.helpers import tiny_config
from tests.s3_server import s3_server
from tests.waiting import wait_until

_OWNER = """
import os, pathlib, signal, sys, time
from hvp_ray.launch.local import pretrain_in_process
from tests.helpers import tiny_config

output, mode, mark = sys.argv[1:]

def report(progress):
    if progress.steps_done >= 9 and not os.path.exists(mark):
        pathlib.Path(mark).touch()
        if mode == "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        while mode == "live" and not os.path.exists(mark + ".go"):
            time.sleep(0.02)
        while mode == "kill":
            time.sleep(0.02)
    return False

print(pretrain_in_process(tiny_config(output, run={"name": "run"}), report_progress=report)["weights_digest"])
"""
"""Trains to its ninth step, one after a checkpoint; then it stops itself, waits, or waits to be killed."""


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as uri:
        yield uri


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that no other test uses."""
    if request.param == "disk":
        return str(tmp_path / "place")
    uri: str = request.getfixturevalue("s3")
    return join_uri(uri.format(""), tmp_path.name)


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the run without disturbance."""
    summary = pretrain_in_process(tiny_config(str(tmp_path_factory.mktemp("alone")), run={"name": "run"}))
    assert summary is not None
    return str(summary["weights_digest"])


@contextmanager
def _owner(place: str, mode: str, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """Start another process that trains the run; yield it when it has done nine steps, and end it."""
    mark = tmp_path / "mark"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _OWNER, place, mode, str(mark)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    try:
        wait_until(lambda: mark.exists() or process.poll() is not None, "nine steps")
        assert process.poll() is None, process.communicate()
        yield process, mark
    finally:
        process.kill()
        process.communicate()


def _train(place: str) -> dict[str, Any]:
    summary = pretrain_in_process(tiny_config(place, run={"name": "run"}))
    assert summary is not None
    return summary


def _content(place: str) -> dict[str, bytes | None]:
    folder = Folder(place)
    return {name: folder.read(name) for name in folder.names()}


def test_owner_that_was_paused_loses_nothing_of_its_successor(
    place: str, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_STALE_SECONDS", 2.0)
    with _owner(place, "pause", tmp_path) as (owner, _):
        wait_until(lambda: _state_of(owner.pid) == "T", "the owner to stop")
        summary = _train(place)
        assert summary["weights_digest"] == digest
        assert summary["num_resumes"] == 1
        before = _content(place)
        os.kill(owner.pid, signal.SIGCONT)
        _, errors = owner.communicate()

    assert owner.returncode != 0
    assert f"LostRunError: process {os.getpid()} on " in errors
    assert "has taken over the run" in errors
    after = _content(place)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    # What was under way when the owner was paused may still arrive: its claim, a file of its own, a manifest that names one.
    late = (
        r"run/(owner/00000001-.*|checkpoints/step-\d+/state-attempt-0001\.pt|checkpoints/step-00000008/manifest\.json"
        r"|log/attempt-0001-.*)"
    )
    assert all(re.fullmatch(late, name) for name in changed), changed
    store = CheckpointStore(
        place_in(place, "run", "checkpoints"), run_identity=summary["run_identity"], keep=9, check_owner=_refuse
    )
    newest = store.load_newest()
    assert newest is not None
    assert newest.step == summary["num_steps"]
    assert weights_digest(newest.method) == digest


def test_second_process_is_refused_while_the_first_one_lives(
    digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(tmp_path / "place")
    monkeypatch.setattr(ownership, "_PATIENCE_SECONDS", 1.0)
    with _owner(place, "live", tmp_path) as (owner, mark):
        with pytest.raises(
            CheckpointError, match=rf"process {owner.pid} on .* is training the run .*another --run.name"
        ):
            _train(place)
        Path(f"{mark}.go").touch()
        output, errors = owner.communicate()
    assert owner.returncode == 0, errors
    assert output.split()[-1] == digest


def test_run_of_a_process_that_was_killed_here_is_free_at_once(
    digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = str(tmp_path / "place")
    with _owner(place, "kill", tmp_path) as (owner, _):
        owner.kill()  # it stays a zombie until `communicate`
        wait_until(lambda: _state_of(owner.pid) == "Z", "the end of the owner")
        monkeypatch.setattr(ownership, "_PATIENCE_SECONDS", 0.0)
        assert _train(place)["weights_digest"] == digest
    assert "may still be training" not in caplog.text


def _state_of(process_id: int) -> str:
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


def test_many_that_claim_at_once_own_the_run_one_after_another(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_STALE_SECONDS", 600.0)
    monkeypatch.setattr(ownership, "_PATIENCE_SECONDS", 600.0)
    monkeypatch.setattr(ownership, "_POLL_SECONDS", 0.1)
    inside, numbers, failures = threading.Lock(), list[int](), list[BaseException]()

    def work(job: str) -> None:
        try:
            for _ in range(3):
                with RunClaim(place, job=job) as claim:
                    assert inside.acquire(blocking=False), "two own the run"
                    claim.check()
                    numbers.append(claim.number)
                    inside.release()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"job {index}",)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 18
    assert len(Folder(place).names()) == 1


def test_later_attempt_of_a_job_succeeds_the_earlier_one_at_once(place: str) -> None:
    with RunClaim(place, job="a") as first, RunClaim(place, job="a") as second:
        assert second.number == first.number + 1
        second.check()
        with pytest.raises(LostRunError, match="as attempt 2.*paused, cut off or replaced") as loss:
            first.check()
        assert loss.value.same_job
        with pytest.raises(LostRunError):
            first.raise_if_lost()
    with RunClaim(place, job="b") as third:
        assert third.number == second.number + 1


def test_claims_of_other_machines_are_free_when_they_do_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ownership, "_STALE_SECONDS", 0.3)
    process = {"machine": "another boot", "id": 1, "start": "7"}
    contents = [
        json.dumps({"job": "x", "host": "far", "process": process, "beat": 3, "ended": False}),
        "",
        "[]",
        '{"process": 3}',
    ]
    for number, content in enumerate(contents):
        folder = Folder(str(tmp_path / str(number)))
        folder.write(f"owner/00000007-{number:016x}.json", content.encode())
        started = time.monotonic()
        with RunClaim(folder.location, job="mine") as claim:
            assert claim.number == 8
        assert time.monotonic() - started >= 0.3
    assert "process 1 on far may still be training the run" in caplog.text


def _refuse() -> None:
    raise LostRunError("another process owns the run")


def _checkpoint(step: int, value: float) -> Checkpoint:
    state = {"state": {}, "param_groups": []}
    return Checkpoint(step=step, method={"w": torch.full((3,), value)}, optimizer=state, predictor={})


def test_files_that_earlier_attempts_left_are_deleted_before_room_is_needed(tmp_path: Path) -> None:
    step = tmp_path / "step-00000004"
    step.mkdir()
    for name in ("state.pt", "state-attempt-0001.pt", "state-attempt-0001.pt.part", "state-attempt-0003.pt", "else.pt"):
        (step / name).write_bytes(b"left")
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "state-attempt-0001.pt.part").write_bytes(b"left")
    store = CheckpointStore(str(tmp_path), run_identity="a", keep=1, attempt=2)
    store.write(_checkpoint(4, 1.0))
    left = {path.name for path in step.iterdir()}
    assert left == {"manifest.json", "state-attempt-0002.pt", "state-attempt-0003.pt", "else.pt"}
    assert not (tmp_path / "step-00000003").exists()


def test_digest_of_a_checkpoint_does_not_depend_on_the_attempt(tmp_path: Path) -> None:
    stores = [CheckpointStore(str(tmp_path / str(n)), run_identity="a", keep=1, attempt=n) for n in (1, 2)]
    for store in stores:
        store.write(_checkpoint(4, 1.0))
    assert stores[0].digest(4) == stores[1].digest(4)
    stores[1].write(_checkpoint(4, 2.0))
    assert stores[0].digest(4) != stores[1].digest(4)


def test_loser_commits_and_deletes_no_checkpoint(tmp_path: Path) -> None:
    winner = CheckpointStore(str(tmp_path), run_identity="a", keep=1, attempt=2)
    loser = CheckpointStore(str(tmp_path), run_identity="a", keep=1, attempt=1, check_owner=_refuse)
    winner.write(_checkpoint(4, 1.0))
    winner.write(_checkpoint(8, 2.0))
    for step in (4, 8):
        with pytest.raises(LostRunError):
            loser.write(_checkpoint(step, 9.0))
    assert winner.committed_steps() == [8]
    newest = winner.load_newest()
    assert newest is not None
    assert newest.method["w"].tolist() == [2.0] * 3


def test_storage_that_fails_is_no_reason_to_give_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ownership, "_BEAT_SECONDS", 0.02)
    with RunClaim(str(tmp_path), job="a") as claim:
        with pytest.MonkeyPatch.context() as outage:
            outage.setattr(Folder, "names", _fail)
            wait_until(lambda: "could not be renewed" in caplog.text, "a failure")
            claim.raise_if_lost()
            assert not claim.is_lost()
            with pytest.raises(CheckpointError, match="could not be checked for another owner: no answer"):
                claim.check()
        claim.check()


def _fail(*_: object, **__: object) -> list[str]:
    raise OSError("no answer")


def test_time_in_which_the_storage_did_not_answer_hardly_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    claim = json.dumps({"job": "x", "host": "far", "process": {"machine": "other", "id": 1, "start": "7"}}).encode()
    waiting = ownership._Waiting("place", ownership.A_RUN)
    for seconds in (0.5, 0.5, 35.0, 0.5):  # an outage while the owner lives
        now += seconds
        assert not waiting.may_succeed([claim], job="mine")
    for beat in range(1, 5):  # it lives
        now += 5.0
        assert not waiting.may_succeed([claim + b" " * beat], job="mine")
    for second in range(1, 31):  # it was killed: after a minute it is named, but not when it seems dead
        now += 1.0
        if 4 <= second < 15:
            with pytest.raises(CheckpointError, match="process 1 on far is training the run"):
                waiting.may_succeed([claim + b" " * 4], job="mine")
        else:
            assert waiting.may_succeed([claim + b" " * 4], job="mine") == (second == 30)
