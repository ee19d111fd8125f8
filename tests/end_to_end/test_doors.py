"""A head started in the checkout takes `ray job submit -- python pipelines/pretrain.py` with its token only, over TLS."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.long]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _make_authority(home: Path) -> None:
    subprocess.run([str(ROOT / "cluster" / "make_certificate.sh"), str(home / ".ray" / "tls")], check=True)


class Head:
    """`cluster/start_node.sh head` on loopback, with its own token and authority. A Ray of its own, as it requires both."""

    def __init__(self, folder: Path) -> None:
        self.port = _free_port()
        self._token = folder / "token"
        self._token.write_text("0123456789abcdef" * 4)
        self._token.chmod(0o600)
        _make_authority(folder)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),  # no token of this account
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
            "RAY_TMPDIR": str(folder),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.port}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        start = [ROOT / "cluster" / "start_node.sh", "head", "--num-cpus=3", "--node-ip-address=127.0.0.1"]
        self._agent_port, self.gcs_port = _free_port(), _free_port()
        start += [
            f"--dashboard-agent-listen-port={self._agent_port}",
            f"--port={self.gcs_port}",
            f"--dashboard-port={self.port}",
            f"--metrics-export-port={_free_port()}",
            "--object-store-memory=200000000",
        ]
        with (folder / "head.log").open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in start],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(lambda: self._is_up() or self.process.poll() is not None, "the head", pause=0.5)
        assert self.process.poll() is None, (folder / "head.log").read_text()[-2000:]

    def _is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self._agent_port}/api/local_raylet_healthz", timeout=5)
        except OSError:
            return False
        return self.status("/api/version", with_token=True) == 200

    def status(self, path: str, *, with_token: bool = False, host: str = "127.0.0.1") -> int | None:
        request = urllib.request.Request(f"http://{host}:{self.port}{path}")
        if with_token:
            request.add_header("Authorization", f"Bearer {self._token.read_text()}")
        try:
            return int(urllib.request.urlopen(request, timeout=10).status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def submit(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--", *command],
            cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="hvp", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets
        head = Head(Path(folder))
        yield head
        head.stop()


def test_job_is_taken_with_the_token_and_trains(head: Head, tmp_path: Path) -> None:
    program = ["python", "pipelines/pretrain.py", "simsiam-digits", "--run.name", "job", "--run.output", str(tmp_path)]
    program += ["--data.num_images", "200", "--training.num_steps", "3", "--tracking.num_figure_images", "0"]
    program += ["--tracking.uri", "none", "--cluster.num_view_workers", "1"]
    done = head.submit(*program)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "job" / "summary.json").read_text())["num_steps"] == 3
    assert "the Ray cluster it was submitted to" in done.stdout
    token = head._token.read_text()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl")]
    assert written
    assert not any(token in text for text in [done.stdout, done.stderr, *(path.read_text() for path in written)])


@pytest.mark.parametrize(
    "environment",
    [
        {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""},
        {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "f" * 64},
    ],
    ids=["no token", "wrong token"],
)
def test_job_without_the_token_is_refused(head: Head, tmp_path: Path, environment: dict[str, str]) -> None:
    done = head.submit("touch", str(tmp_path / "was-here"), **environment)
    assert done.returncode != 0
    assert not (tmp_path / "was-here").exists()


def test_dashboard_refuses_requests_without_a_token_and_listens_on_one_address(head: Head) -> None:
    for path in ("/api/jobs/", "/api/v0/nodes", "/nodes?view=summary", "/logs"):
        assert head.status(path) == 401, path
    assert head.status("/api/jobs/", with_token=True) == 200
    assert head.status("/api/jobs/", with_token=True, host="127.0.0.2") is None  # it listens on 127.0.0.1 only


def test_driver_without_a_certificate_is_refused(head: Head, tmp_path: Path) -> None:
    program = (
        "from hvp_ray.launch.environment import prepare_ray_environment as p; p(); import hvp_ray.stream.connect as c; "
    )
    environment = head.environment | {"RAY_ADDRESS": f"127.0.0.1:{head.gcs_port}"}
    for home, status in ((head.environment["HOME"], 0), (str(tmp_path), 1)):  # the head's folder has a certificate
        done = subprocess.run(
            [sys.executable, "-c", f"{program} c.connect_ray(None)"],
            cwd=ROOT, env=environment | {"HOME": home}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr[-3000:]
    assert "it uses TLS and this program does not" in done.stderr


@pytest.mark.parametrize("missing", ["no token in", "the authority's certificate .* cannot be read", "names none of"])
def test_node_without_a_token_or_a_certificate_is_not_started(missing: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    if missing != "no token in":
        environment["RAY_AUTH_TOKEN"] = "f" * 64
    if missing == "names none of":
        make = [str(ROOT / "cluster" / "make_certificate.sh"), str(tmp_path / ".ray" / "tls")]
        subprocess.run([*make, socket.gethostname(), "192.0.2.99"], check=True)
        (tmp_path / ".ray" / "tls" / "ca.key").unlink()
    for role in ("head", "views"):
        command = [str(ROOT / "cluster" / "start_node.sh"), role]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 2
        assert re.search(missing, done.stderr), done.stderr
