"""Runs on a bucket: what is pulled is what was pushed, whatever died between, and a run goes on from there on any machine.

`file://` for the random sequences, and a server that speaks S3 (moto, on loopback) for whole runs.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hvp_ray.config import RunConfig
from hvp_ray.credentials import refuse_credentials
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.files import Folder, check_writable, is_inside, join_uri
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.local_cache import local_weights, with_local_weights
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs import storage as run_storage
from hvp_ray.runs.check import check_before_start
from hvp_ray.runs.checkpoint import CheckpointStore
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.record import finished_summary
from hvp_ray.runs.storage import RunStorage, fetch_run
from hvp_ray.tracking.run_log import ATTEMPTS, EVALUATIONS, METRICS, RunLog, next_attempt, read_records
from hvp_ray.tracking.selection_log import selection_files
from hvp_ray.training.trainee import build_untrained_method
from tests.helpers import tiny_config
from tests.s3_server import s3_server
from tests.unit.runs.dying_run import PowerCutError, train_and_die

LOGS = ("metrics", "evaluations", "unreadable-rank-0")
OTHERS = ("config.json", "mlflow.json", "knn_pending/step-4", "knn_pending/step-8")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvp_ray.files._PAUSES_SECONDS", (0.01, 0.01))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as uri:
        yield uri


def _on_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Go on as on another machine: another local disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machines" / name))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Bucket:
    """A `file://` bucket with one run, and how it looked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.uri = self.folder.as_uri()

    def content(self) -> dict[str, bytes]:
        return _files(self.folder) if self.folder.exists() else {}

    def put(self, content: dict[str, bytes]) -> None:
        for path in self.content():
            (self.folder / path).unlink()
        for name, value in content.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(value)


def _change_at_random(log: RunLog, generator: np.random.Generator, step: int) -> int:
    """Append to the log, close its segment, write, rewrite and delete other files; return the last step."""
    for name in LOGS:
        for _ in range(int(generator.integers(0, 4))):
            step += 1
            log.write(name, {"step": step, "text": "x" * int(generator.integers(0, 40))})
    for name in OTHERS:
        path = log.run_dir / name
        if generator.random() < 0.4:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(generator.bytes(int(generator.integers(0, 30))))
        elif generator.random() < 0.2:
            path.unlink(missing_ok=True)
    if generator.random() < 0.8:
        log.start_segment(step)
    return step


def _die_within_push(
    before: dict[str, bytes], after: dict[str, bytes], generator: np.random.Generator
) -> tuple[dict[str, bytes], set[str]]:
    """Return the bucket as a push leaves it that died, and which files had arrived or gone.

    Uploads go side by side, so any of them may be there. Nothing is deleted before all are there.
    """
    written = [name for name in after if before.get(name) != after[name]]
    arrived = {name for name in written if generator.random() < 0.5}
    state = before | {name: after[name] for name in arrived}
    if len(arrived) == len(written):
        gone = {name for name in set(before) - set(after) if generator.random() < 0.5}
        state = {name: content for name, content in state.items() if name not in gone}
        arrived |= gone
    return state, arrived


def _attempt(storage: RunStorage, bucket: _Bucket, generator: np.random.Generator, pushed: dict[str, bytes]) -> None:
    """Change files and push, some times; die at the end, or within a push.

    `pushed`, the slow oracle, has the content of each file as it was when it was last uploaded, and is kept up to date.
    """
    assert _files(storage.folder) == pushed
    step = max((record["step"] for name in LOGS for record in read_records(storage.folder, name)), default=0)
    step = int(generator.integers(0, step + 1))
    log = RunLog(storage.folder, attempt=next_attempt(storage.folder), first_step=step)
    for _ in range(int(generator.integers(1, 4))):
        step = _change_at_random(log, generator, step)
        here, before = _files(storage.folder), bucket.content()
        storage.push()
        if generator.random() < 0.5:
            state, arrived = _die_within_push(before, bucket.content(), generator)
            bucket.put(state)
            for name in arrived:
                pushed.pop(name, None)
                pushed.update({name: here[name]} if name in here else {})
            break
        pushed.clear()
        pushed.update(here)
    raise PowerCutError


@pytest.mark.parametrize("seed", range(12))
def test_what_is_pulled_is_what_was_pushed_whatever_died_between(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(seed)
    bucket = _Bucket(tmp_path / "bucket")
    pushed: dict[str, bytes] = {}
    for _ in range(8):
        _on_machine(monkeypatch, tmp_path, str(generator.integers(2)))  # with what earlier attempts left there
        with pytest.raises(PowerCutError), RunStorage(tmp_path, bucket.uri, rank=0) as storage:
            _attempt(storage, bucket, generator, pushed)


def test_each_byte_of_the_log_is_uploaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_machine(monkeypatch, tmp_path, "a")
    written: list[str] = []
    write = Folder.write

    def note(folder: Folder, name: str, content: bytes) -> None:
        written.append(name)
        write(folder, name, content)

    monkeypatch.setattr(Folder, "write", note)
    bucket = _Bucket(tmp_path / "bucket")
    with RunStorage(tmp_path, bucket.uri, rank=0) as storage:
        log = RunLog(storage.folder)
        for step in range(1, 101):
            log.write(METRICS, {"step": step, "metrics": {"train/loss": 1.0 / step}})
            log.start_segment(step)
            storage.push()
            storage.push()  # nothing is new
        assert len(written) == len(set(written)) == 100
        assert bucket.content() == _files(storage.folder)
    assert not storage.folder.exists()

    # A resume uploads what it writes, and not what was there.
    with RunStorage(tmp_path, bucket.uri, rank=0) as storage:
        log = RunLog(storage.folder, attempt=2, first_step=90)
        log.write(METRICS, {"step": 91, "metrics": {}})
        written.clear()
        storage.push()
        assert written == ["log/attempt-0002-step-00000090/metrics.jsonl"]
        assert [record["step"] for record in read_records(storage.folder, METRICS)] == list(range(1, 92))


def test_ranks_of_one_machine_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_machine(monkeypatch, tmp_path, "a")
    uri = _Bucket(tmp_path / "bucket").uri
    with RunStorage(tmp_path, uri, rank=0) as first, RunStorage(tmp_path, uri, rank=1) as second:
        assert first.folder != second.folder
        for rank, storage in enumerate((first, second)):
            RunLog(storage.folder).write(f"unreadable-rank-{rank}", {"step": rank})
            (storage.folder / "config.json").write_text(f"of rank {rank}")
        second.push()
        first.push()
        first.pull_decisions()
        assert [record["step"] for record in read_records(first.folder, "unreadable-rank-1")] == [1]
    with RunStorage(tmp_path, uri, rank=2) as third:  # every rank reads the decisions of all, and nothing else
        segment = "log/attempt-0001-step-00000000"
        assert set(_files(third.folder)) == {f"{segment}/unreadable-rank-{rank}.jsonl" for rank in (0, 1)}
    with RunStorage(tmp_path, uri, rank=0) as first:
        assert (first.folder / "config.json").read_text() == "of rank 0"


def test_a_run_is_worked_on_once_on_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_machine(monkeypatch, tmp_path, "a")
    monkeypatch.setattr(run_storage, "_LOCK_PATIENCE_SECONDS", 0.0)
    uri = _Bucket(tmp_path / "bucket").uri
    with RunStorage(tmp_path, uri, rank=0), pytest.raises(ConfigError, match="another process of this machine"):
        RunStorage(tmp_path, uri, rank=0)
    with RunStorage(tmp_path, uri, rank=0):
        pass


def test_an_upload_that_fails_is_tried_again_and_then_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _on_machine(monkeypatch, tmp_path, "a")
    bucket = _Bucket(tmp_path / "bucket")
    with RunStorage(tmp_path, bucket.uri, rank=0) as storage:
        RunLog(storage.folder).write(METRICS, {"step": 1})
        bucket.put({"log": b"a file where the folder must be"})
        with pytest.raises(CheckpointError, match="could not be written.*start the run again with its name") as failure:
            storage.push()
        assert str(storage.folder) in str(failure.value)
        assert caplog.text.count("retrying in 0.01 s") == 2
        bucket.put({})
        storage.push()
        shutil.rmtree(storage.folder / "log")
    with RunStorage(tmp_path, bucket.uri, rank=0) as storage:
        assert [record["step"] for record in read_records(storage.folder, METRICS)] == [1]


def test_a_local_run_has_no_working_copy(tmp_path: Path) -> None:
    with RunStorage(tmp_path, None, rank=0) as storage:
        storage.push()
        storage.push_file("mlflow.json")
        storage.pull_decisions()
        assert storage.folder == tmp_path
    assert tmp_path.is_dir()


def test_names_go_before_the_query() -> None:
    assert join_uri("s3://b/p/?region=x", "run", "a.json") == "s3://b/p/run/a.json?region=x"
    assert join_uri("file:///p", "run") == "file:///p/run"


def test_names_that_lead_out_of_the_folder_are_not_followed() -> None:
    for name in ("../owned", "selection/../../owned", "/owned", "selection/.."):
        assert not is_inside(name)
    for name in ("config.json", "selection/part-1.parquet", "a..b"):
        assert is_inside(name)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("foo://bucket/runs", "is not a storage that can be used.*s3://bucket/prefix"),
        ("s3:///runs", "is not a storage that can be used.*[Mm]issing bucket"),
        ("s3://", "names no bucket"),
        ("s3://bucket/runs?endpoint=x", "is not a storage that can be used.*endpoint"),
        ("s3://AKIA123:se/cret@bucket/runs", "before the @.*AWS_ACCESS_KEY_ID"),
        ("s3://AKIA123@bucket/runs", "before the @.*AWS_ACCESS_KEY_ID"),
        ("abfs://box:cret@account.dfs.core.windows.net/runs", "before the @.*AZURE_CLIENT_ID"),
        ("gs://bucket/runs?session_token=cret", "'session_token'.*GOOGLE_APPLICATION_CREDENTIALS"),
        ("s3://bucket/runs?endpoint_override=http://me:cret@host:9000", "'endpoint_override'"),
    ],
)
def test_uris_that_cannot_be_used_are_refused_and_secrets_not_repeated(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        check_before_start(tiny_config(uri))
    assert "cret" not in str(refusal.value).replace("secret", "")


def test_containers_and_anonymous_access_are_no_credentials() -> None:
    for uri in ("abfs://box@account.dfs.core.windows.net/runs", "gs://anonymous@bucket/x", "file:///data/a:b@c"):
        refuse_credentials("run.output", uri)


def test_a_bucket_that_is_not_there_is_said_before_anything_starts(s3: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_BUCKET.*must exist and be reachable.*AWS_ACCESS_KEY_ID"):
        check_writable(s3.format("").replace("//bucket/", "//other-bucket/"), option="run.output")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be used"):
        check_writable((tmp_path / "file" / "runs").as_uri(), option="run.output")
    check_writable(s3.format("/probed"), option="run.output")
    assert Folder(s3.format("/probed")).names() == []


def _config(output: str) -> RunConfig:
    tracking: dict[str, Any] = {"knn_every_epochs": 1, "selection_images_per_epoch": 64}
    config = tiny_config(output, run={"name": "run"}, tracking=tracking)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, num_images=100))


@dataclasses.dataclass(frozen=True)
class _BothRuns:
    undisturbed: Path
    uri: str
    summary: dict[str, Any]
    config: RunConfig


@pytest.fixture(scope="module")
def both_runs(s3: str, tmp_path_factory: pytest.TempPathFactory) -> _BothRuns:
    """A run in a folder, and the same on a bucket, which died twice and went on with another local disk."""
    tmp_path = tmp_path_factory.mktemp("runs")
    assert pretrain_in_process(_config(str(tmp_path))) is not None
    config = _config(s3.format(""))
    with pytest.MonkeyPatch.context() as monkeypatch:
        _on_machine(monkeypatch, tmp_path, "a")
        train_and_die(config, at_step=7)
        _on_machine(monkeypatch, tmp_path, "b")
        train_and_die(config, at_step=9)
        _on_machine(monkeypatch, tmp_path, "a")  # which still has what it had at step 7
        summary = pretrain_in_process(config)
    assert summary is not None
    return _BothRuns(tmp_path / "run", s3.format("/run"), summary, config)


def _records_on(uri: str, name: str, *, dropped: bool = False) -> list[dict[str, Any]]:
    return list(read_records(fetch_run(uri, folders=("log",), option="RUN"), name, dropped=dropped))


def test_run_that_moved_between_machines_equals_the_undisturbed_one(both_runs: _BothRuns) -> None:
    undisturbed = json.loads((both_runs.undisturbed / "summary.json").read_text())
    assert both_runs.summary["weights_digest"] == undisturbed["weights_digest"]
    assert both_runs.summary["num_resumes"] == 2
    remote = Folder(both_runs.uri)
    assert json.loads(remote.read("summary.json") or b"") == both_runs.summary == finished_summary(both_runs.config)
    store = CheckpointStore(
        join_uri(both_runs.uri, "checkpoints"), run_identity=both_runs.summary["run_identity"], keep=2
    )
    assert store.committed_steps() == [8, 10]


def test_log_of_the_moved_run_has_every_step_once(
    both_runs: _BothRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_machine(monkeypatch, tmp_path, "c")
    for name in (METRICS, EVALUATIONS):
        here, there = list(read_records(both_runs.undisturbed, name)), _records_on(both_runs.uri, name)
        assert [record["step"] for record in there] == [record["step"] for record in here]
        losses = [[record["metrics"].get("train/loss") for record in records] for records in (here, there)]
        assert losses[0] == losses[1]
        plain = Folder(both_runs.uri).read(f"{name}.jsonl")
        assert plain is not None and [json.loads(line) for line in plain.splitlines()] == there
    attempts = _records_on(both_runs.uri, ATTEMPTS, dropped=True)
    assert [attempt["step"] for attempt in attempts] == [0, 4, 8]


def test_files_of_the_moved_run_are_those_of_the_undisturbed_one(both_runs: _BothRuns) -> None:
    names = Folder(both_runs.uri).names(), _files(both_runs.undisturbed)
    # Segments end at checkpoints, of which the moved run has others, and other attempts wrote its files.
    there, here = (
        {re.sub(r"-attempt-\d+", "", name) for name in found if not name.startswith(("log/", "owner/"))}
        for found in names
    )
    assert there == here
    assert "owner/00000001" in "".join(names[1])
    assert "owner/00000003" in "".join(names[0])


def test_log_of_choices_of_the_moved_run_is_read_through_its_uri(
    both_runs: _BothRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvp_ray.runs.find import find_run

    _on_machine(monkeypatch, tmp_path, "c")
    copy = find_run(both_runs.uri, needs=("config.json", "backbone.safetensors"), folders=("log",))
    tables = [
        pa.concat_tables(pq.read_table(path) for path in selection_files(folder)).sort_by("step")
        for folder in (copy, both_runs.undisturbed)
    ]
    assert tables[0].equals(tables[1])
    stale = copy / "log" / "attempt-0009-step-00000000" / "selection-00000009.parquet"
    stale.parent.mkdir()
    stale.write_bytes(b"of another run of this name")
    fetch_run(both_runs.uri, folders=("log",), option="RUN")
    assert not stale.exists()
    with pytest.raises(CheckpointError, match="there is no run"):
        find_run(join_uri(both_runs.uri, "no-such-run"))
    with pytest.raises(CheckpointError, match="has no absent.txt"):
        find_run(both_runs.uri, needs=("absent.txt",))


def test_results_go_to_the_run(both_runs: _BothRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvp_ray.runs.find import find_run, keep_results

    _on_machine(monkeypatch, tmp_path, "c")
    copy = find_run(both_runs.uri)
    (copy / "evaluation.json").write_text("{}")
    (tmp_path / "elsewhere.json").write_text("{}")
    keep_results(both_runs.uri, copy, [copy / "evaluation.json", tmp_path / "elsewhere.json"])
    remote = Folder(both_runs.uri)
    assert remote.read("evaluation.json") == b"{}"
    assert remote.read("elsewhere.json") is None
    remote.delete("evaluation.json")


def test_run_on_a_bucket_gives_initial_weights(
    both_runs: _BothRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_machine(monkeypatch, tmp_path, "c")
    encoders = []
    for weights in (both_runs.uri, str(both_runs.undisturbed)):
        config = tiny_config(str(tmp_path))
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, initial_weights=weights))
        encoders.append(build_untrained_method(with_local_weights(config)).encoder.state_dict())
        job = prepare_run(config, resolve_inline(config.cluster))
        assert json.loads((job.run_dir / "config.json").read_text())["identity"]["initial weights"] != "missing"
    assert all(torch.equal(encoders[0][name], tensor) for name, tensor in encoders[1].items())
    missing = join_uri(both_runs.uri, "absent.safetensors")
    with pytest.raises(CheckpointError, match="there is no file"):
        local_weights(missing)


def test_bucket_remembers_the_identity_of_a_run(both_runs: _BothRuns) -> None:
    config = both_runs.config
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    with pytest.raises(CheckpointError, match=r"cannot be resumed with other settings(.|\n)*run.seed: 0 -> 1"):
        prepare_run(other, resolve_inline(other.cluster))
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False))
    with pytest.raises(ConfigError, match="exists, and run.resume=False"):
        prepare_run(again, resolve_inline(again.cluster))


def test_checkpoint_that_cannot_be_reached_is_not_passed_over(tmp_path: Path) -> None:
    """A folder in the place of the file is an OSError as an outage is."""
    uri = tmp_path.as_uri()
    store = CheckpointStore(uri, run_identity="a", keep=2)
    (tmp_path / "step-00000001").mkdir()
    manifest = {"run_identity": "a", "files": {"state.pt": {"bytes": 1, "sha256": "0"}}}
    (tmp_path / "step-00000001" / "manifest.json").write_text(json.dumps(manifest))
    os.mkdir(tmp_path / "step-00000001" / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be read now"):
        store.load_newest()
