"""The SQLite store of MLflow: made whole or not at all, whoever is killed, and found again whatever its folder is called."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvp_ray.tracking.mlflow import MlflowFeed, MlflowRun, quiet_mlflow
from hvp_ray.tracking.mlflow_store import StoreError, prepare_store, store_path, store_uri
from hvp_ray.tracking.run_log import METRICS, RunLog

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as it is made, to be copied: making one takes a second or more."""
    quiet_mlflow()
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    prepare_store(store_uri(path))
    return path


def _client(path: Path) -> Any:
    import mlflow

    return mlflow.MlflowClient(store_uri(path))


def _run(path: Path, experiment: str = "tests") -> MlflowRun:
    return MlflowRun(
        uri=store_uri(path),
        experiment=experiment,
        artifact_root=(path.parent / "mlflow-artifacts").as_uri(),
        run_name="one",
        params={"a": 1},
        tags={},
        dataset_name="digits",
        dataset_source="digits",
        dataset_digest="0" * 64,
    )


def _write(run_dir: Path, steps: range) -> None:
    log = RunLog(run_dir)
    for step in steps:
        log.write(METRICS, {"step": step, "time": 1.0, "metrics": {"train/loss": 1.0 / step}})


def _steps(path: Path, run_id: str | None) -> list[int]:
    return [metric.step for metric in _client(path).get_metric_history(run_id, "train/loss")]


def _wait(condition: Callable[[], bool]) -> None:
    while not condition():  # the suite's own limit ends a test that waits in vain
        time.sleep(0.01)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # SQLite has just removed its journal
        return 0


def _query(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_process_killed_while_it_makes_the_store_leaves_none_and_the_next_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    program = (
        "import sys; from hvp_ray.tracking.mlflow_store import prepare_store, store_uri; from pathlib import Path; "
        "prepare_store(store_uri(Path(sys.argv[1])))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stderr=subprocess.DEVNULL)
    _wait(lambda: any(map(_size, tmp_path.iterdir())) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()
    prepare_store(store_uri(path))
    assert _client(path).search_runs(["0"]) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_feeds_that_begin_at_once_share_one_store_and_one_experiment(tmp_path: Path) -> None:
    """Threads stand for processes: the lock belongs to an open file, not to a process."""
    path = tmp_path / "mlflow.db"
    for name in ("a", "b", "c"):
        _write(tmp_path / name, range(1, 4))
    feeds = [MlflowFeed(_run(path), tmp_path / name, watches_system=False) for name in ("a", "b", "c")]
    assert [feed.finish(status="FINISHED", artifacts=[], values={}) for feed in feeds] == [True] * 3
    assert len({feed.experiment_id for feed in feeds}) == 1
    assert [_steps(path, feed.run_id) for feed in feeds] == [[1, 2, 3]] * 3
    assert not list(tmp_path.glob("mlflow.db.*"))


def _make_half(path: Path) -> None:
    """The trace of an interrupted migration: a table that it made, and none of what comes after."""
    _query(path, "DELETE FROM alembic_version")


def _make_nonsense(path: Path) -> None:
    path.write_bytes(b"this was a database once" * 1000)


def _make_unversioned(path: Path) -> None:
    path.unlink()
    _query(path, "CREATE TABLE review_queues (id INTEGER)")


@pytest.mark.parametrize("damage", [_make_half, _make_nonsense, _make_unversioned])
def test_store_that_mlflow_cannot_open_is_set_aside_and_the_run_arrives(
    whole_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(whole_store, path)
    damage(path)
    before = path.read_bytes()
    _write(tmp_path / "one", range(1, 4))
    feed = MlflowFeed(_run(path), tmp_path / "one", watches_system=False)
    assert feed.finish(status="FINISHED", artifacts=[], values={})
    assert _steps(path, feed.run_id) == [1, 2, 3]
    assert (tmp_path / "mlflow.db.broken-1").read_bytes() == before
    assert caplog.text.count("mlflow.db.broken-1") == 1


def test_store_of_an_older_mlflow_is_migrated_with_its_runs(whole_store: Path, tmp_path: Path) -> None:
    import mlflow.store
    from alembic import command
    from alembic.config import Config

    path = tmp_path / "mlflow.db"
    config = Config()
    config.set_main_option("script_location", str(Path(mlflow.store.__path__[0]) / "db_migrations"))
    config.set_main_option("sqlalchemy.url", store_uri(path))
    from alembic.script import ScriptDirectory
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    engine = create_engine(store_uri(path))
    Base.metadata.create_all(engine)
    engine.dispose()
    head = ScriptDirectory.from_config(config).get_current_head()
    assert head is not None
    command.upgrade(config, f"{head}-3")
    _query(path, "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'mine', 'active')")
    prepare_store(store_uri(path))
    assert _client(path).get_experiment_by_name("mine").experiment_id == "7"
    assert (tmp_path / "mlflow.db.old-1").exists()
    assert not list(tmp_path.glob("mlflow.db.broken-*"))


def test_store_of_a_newer_mlflow_is_left_alone_and_the_run_does_not_wait(
    whole_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(whole_store, path)
    _query(path, "UPDATE alembic_version SET version_num = 'ffffffffffff'")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer MLflow.*--tracking.uri"):
        prepare_store(store_uri(path))
    _write(tmp_path / "one", range(1, 4))
    feed = MlflowFeed(_run(path), tmp_path / "one", watches_system=False)
    assert not feed.finish(status="FINISHED", artifacts=[], values={}, timeout_seconds=1e6)
    assert "newer MLflow" in caplog.text
    assert path.read_bytes() == before


def test_any_name_of_a_folder_will_do(whole_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a%20b #1?x=y ü 100%"
    folder.mkdir()
    path = folder / "mlflow.db"
    shutil.copy(whole_store, path)
    assert store_path(store_uri(path)) == path
    _write(folder / "one", range(1, 4))
    (folder / "one" / "a.png").write_bytes(b"png")
    feed = MlflowFeed(_run(path), folder / "one", watches_system=False)
    assert feed.finish(status="FINISHED", artifacts=[folder / "one" / "a.png"], values={})
    assert _steps(path, feed.run_id) == [1, 2, 3]
    assert list(folder.glob("mlflow-artifacts/*/artifacts/figures/a.png"))
    assert list(tmp_path.iterdir()) == [folder]


def test_deleted_experiment_is_followed_by_another_of_its_name_and_the_run_does_not_wait(
    whole_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(whole_store, path)
    client = _client(path)
    client.delete_experiment(client.create_experiment("tests"))
    for name in ("one", "two"):
        _write(tmp_path / name, range(1, 4))
        feed = MlflowFeed(_run(path), tmp_path / name, watches_system=False)
        assert feed.finish(status="FINISHED", artifacts=[], values={}, timeout_seconds=1e6)
        assert client.get_experiment(feed.experiment_id).name == "tests-2"
        assert _steps(path, feed.run_id) == [1, 2, 3]
    assert "'tests' was deleted" in caplog.text


def test_run_that_is_deleted_while_it_is_fed_is_sent_again_as_a_new_one(whole_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(whole_store, path)
    _write(tmp_path / "one", range(1, 4))
    feed = MlflowFeed(_run(path), tmp_path / "one", watches_system=False)
    _wait(lambda: feed.run_id is not None and len(_steps(path, feed.run_id)) == 3)
    deleted = feed.run_id
    _client(path).delete_run(deleted)
    _write(tmp_path / "one", range(4, 7))
    assert feed.finish(status="FINISHED", artifacts=[], values={"summary/a": 1.0}, timeout_seconds=1e6)
    assert feed.run_id != deleted
    assert _steps(path, feed.run_id) == [1, 2, 3, 4, 5, 6]
    later = MlflowFeed(_run(path), tmp_path / "one", watches_system=False)
    assert later.finish(status="FINISHED", artifacts=[], values={})
    assert later.run_id == feed.run_id


def test_stores_that_are_no_files_of_sqlite_are_left_to_mlflow() -> None:
    for uri in ("http://127.0.0.1:5000", "postgresql://host/db", "sqlite://", "sqlite:///:memory:", "file:///x", "x"):
        assert store_path(uri) is None
        prepare_store(uri)
