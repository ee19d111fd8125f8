"""A real MLflow server dies, restarts and hangs during a run: training does not slow down, and no record is lost.

Also its access control: it refuses foreign Host headers, and requests without credentials if they are required.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvp_ray.tracking.mlflow import MlflowFeed, MlflowRun, quiet_mlflow
from hvp_ray.tracking.run_log import METRICS, RunLog, read_records
from hvp_ray.tracking.trackers import catch_up, lacks_records
from tests.waiting import wait_until

pytestmark = pytest.mark.long

STEP_SECONDS = 0.02


class Server:
    """`mlflow server` on a SQLite file."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet_mlflow()
        command = [str(Path(sys.executable).with_name("mlflow")), "server", "--app-name", "basic-auth"]
        command += ["--workers", "1", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        command += ["--allowed-hosts", "127.0.0.1:*", "--cors-allowed-origins", self.uri]
        (self._folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{self._folder}/auth.db\nadmin_username = admin\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\nauth_cache_ttl_seconds = 60\n"
        )
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_AUTH_CONFIG_PATH": str(self._folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": os.environ["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "for this test only",
        }
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self._folder
            )
        wait_until(self._is_healthy, "the MLflow server", pause=0.1)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", "a password of twelve or more")
        server = Server(tmp_path_factory.mktemp("mlflow"))
        server.start()
        yield server
        server.signal(signal.SIGCONT)
        server.signal(signal.SIGKILL)


class Trainer(threading.Thread):
    """Writes a step every 20 ms, as rank 0 does, and measures how long the writing takes."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self._log = RunLog(run_dir)
        self._ended = threading.Event()
        self.slowest_seconds = 0.0
        self.steps = 0

    def run(self) -> None:
        while not self._ended.wait(STEP_SECONDS):
            start = time.thread_time()
            self.steps += 1
            metrics = {"train/loss": 1.0 / self.steps, "perf/wait_seconds": 0.0}
            self._log.write(METRICS, {"step": self.steps, "time": time.time(), "metrics": metrics})
            self.slowest_seconds = max(self.slowest_seconds, time.thread_time() - start)

    def wait_for_steps(self, num_steps: int) -> None:
        """Wait until it has done more steps."""
        wanted = self.steps + num_steps
        wait_until(lambda: self.steps >= wanted, "steps of the trainer")

    def end(self) -> None:
        self._ended.set()
        self.join()


def test_server_dies_comes_back_and_hangs_and_mlflow_ends_with_every_step(server: Server, tmp_path: Path) -> None:
    import mlflow

    run = MlflowRun(
        uri=server.uri,
        experiment="outage",
        artifact_root=None,
        run_name="outage",
        params={"run.seed": 0},
        tags={},
        dataset_name="digits",
        dataset_source="digits",
        dataset_digest="0" * 36,
    )
    trainer = Trainer(tmp_path)
    trainer.start()
    feed = MlflowFeed(run, tmp_path)
    wait_until(lambda: feed.run_id is not None, "the run in MLflow")
    server.signal(signal.SIGKILL)
    wait_until(lambda: feed.is_away, "the feed to notice that the server is down")
    trainer.wait_for_steps(100)
    assert feed.is_away
    server.start()
    wait_until(lambda: not feed.is_away and feed.numbers()["hvp_ray_mlflow_backlog_records"] < 200, "the backlog")
    server.signal(signal.SIGSTOP)
    trainer.wait_for_steps(100)
    trainer.end()
    (tmp_path / "summary.json").write_text(json.dumps({"knn_top1": 0.5}))
    assert not feed.finish(status="FINISHED", artifacts=[], values={"summary/knn_top1": 0.5}, timeout_seconds=3.0)
    assert trainer.slowest_seconds < 0.02  # CPU time of a step's record: nothing was sent in its thread
    assert lacks_records(tmp_path)
    server.signal(signal.SIGCONT)

    summary = catch_up(tmp_path)
    assert summary is not None
    assert not lacks_records(tmp_path)
    client = mlflow.MlflowClient(server.uri)
    for key in ("train/loss", "perf/wait_seconds"):
        points = [(metric.step, metric.value) for metric in client.get_metric_history(summary["mlflow_run_id"], key)]
        assert points == [(r["step"], r["metrics"][key]) for r in read_records(tmp_path, METRICS)]
    assert client.get_run(summary["mlflow_run_id"]).info.status == "FINISHED"
    assert client.get_run(summary["mlflow_run_id"]).data.metrics["summary/knn_top1"] == 0.5


@pytest.mark.parametrize(
    ("headers", "credentials", "status"),
    [
        ({}, "admin:a password of twelve or more", 200),
        ({}, None, 401),
        ({}, "admin:password", 401),
        ({"Host": "evil.example"}, "admin:a password of twelve or more", 403),
        ({"Origin": "http://evil.example"}, "admin:a password of twelve or more", 403),
    ],
)
def test_mlflow_answers_its_own_name_with_credentials_only(
    server: Server, headers: dict[str, str], credentials: str | None, status: int
) -> None:
    import base64

    request = urllib.request.Request(
        f"{server.uri}/api/2.0/mlflow/experiments/create", data=b'{"name": "%d"}' % time.time_ns(), headers=headers
    )
    request.add_header("Content-Type", "application/json")
    if credentials is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
    try:
        found = urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        found = error.code
    assert found == status
