"""The cluster that is disturbed: head, trainer host, view host, and a host with MLflow and an S3 server."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.chaotic.hosts import ROOT, Host, hosts, run
from hvp_ray.data.digits import DigitsSource

CALM = "calm"
"""Name of the undisturbed run."""
NUM_IMAGES = 400
STORE_BYTES = 150_000_000
_DISK_BYTES = 256 * 2**20
_FIRST_PATIENCE_SECONDS = 180.0
_FULL_SECONDS = 30.0
_TRAINER_TITLE = "ray::RayTrainWorker"
_VIEW_WORKER_TITLE = "ray::ViewWorker"
_PUT_OBJECTS = """
import sys, time, numpy, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
held = [ray.put(numpy.ones(10_000_000, numpy.uint8)) for _ in range(25)]
print("full", flush=True)
time.sleep(3600)
"""
_MAKE_BUCKET = """
import sys, pyarrow.fs
pyarrow.fs.FileSystem.from_uri(sys.argv[1] + "&allow_bucket_creation=true")[0].create_dir("bucket")
"""
_DOWNLOAD = """
import sys, pyarrow.fs
from pathlib import Path
system, path = pyarrow.fs.FileSystem.from_uri(sys.argv[1])
for name in ("summary.json", "metrics.jsonl"):
    Path(sys.argv[2], name).write_bytes(system.open_input_stream(f"{path}/{name}").read())
"""


class ChaosCluster:
    """The hosts, the servers, and what the faults need of them."""

    def __init__(self, folder: Path, named: dict[str, Host]) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.head, self.trainer, self.views, self.services = (
            named[n] for n in ("head", "trainer", "views", "services")
        )
        self._bucket = f"bucket?endpoint_override={self.services.address}:9000&scheme=http"

    def start(self) -> None:
        """Start servers and nodes, and wait until all answer.

        Raises:
            TimeoutError: they do not.
        """
        moto = [sys.executable, "-m", "moto.server", "-H", self.services.address, "-p", "9000"]
        self.services.start(moto, self.folder / "s3.log")
        self.start_mlflow()
        self.head.keep_node("head", 0)
        self.trainer.keep_node("both", 1)
        self.views.keep_node("views", 2)
        bucket = [sys.executable, "-c", _MAKE_BUCKET, f"s3://{self._bucket}"]
        self._wait("the S3 server", lambda: self.services.start(bucket, self.folder / "s3.log").wait() == 0)
        self._wait("MLflow", lambda: b"startup complete" in (self.folder / "mlflow.log").read_bytes())
        self._wait("the nodes", lambda: self._count_nodes() == 3)

    def start_mlflow(self) -> None:
        """Start the MLflow server."""
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        options = ["--host", self.services.address, "--port", "5000", "--workers", "1", "--backend-store-uri", store]
        options += ["--artifacts-destination", str(self.folder / "artifacts"), "--allowed-hosts", "*"]
        self.services.start([sys.executable, "-m", "mlflow", "server", *options], self.folder / "mlflow.log")

    def start_job(self, name: str, *, where: str, num_steps: int) -> subprocess.Popen[bytes]:
        """Start the run of this name, or continue it."""
        output = str(self.runs) if where == "disk" else f"s3://{self._bucket.replace('?', '/runs?')}"
        words = [sys.executable, "pipelines/pretrain.py", "simsiam-digits", "--run.name", name, "--run.output", output]
        words += ["--data.source", str(self.folder / "images"), "--data.max_unreadable_fraction", "0.1"]
        words += ["--method.backbone.channels", "4", "8", "16", "32", "--method.projector_dim", "32"]
        words += ["--method.predictor_hidden_dim", "16", "--selection.num_views", "16"]
        words += ["--views.global_views.size_px", "12", "--views.evaluation_resize_px", "12"]
        words += ["--training.images_per_step", "16", "--training.num_steps", str(num_steps)]
        words += ["--training.checkpoint_every_steps", "20", "--tracking.knn_images", "100"]
        words += ["--tracking.num_figure_images", "0", "--tracking.log_every_steps", "1"]
        words += ["--tracking.uri", f"http://{self.services.address}:5000"]
        words += [
            "--cluster.num_view_workers",
            "3",
            "--cluster.late_seconds",
            "5",
            "--cluster.max_trainer_failures",
            "1000",
        ]
        return self.head.start(words, self.job_log(name), RAY_ADDRESS=f"{self.head.address}:6379")

    def job_log(self, name: str) -> Path:
        """Return the file with what the driver printed."""
        return self.folder / f"{name}.log"

    def last_step(self, name: str) -> int:
        """Return the last step that any attempt at a run has recorded; 0: none yet."""
        places = [self.runs, *(host.folder / "cache" for host in (self.trainer, self.views))]
        last = 0
        for place in places:
            for folder, _, files in os.walk(place):  # passes over folders that are deleted meanwhile
                if "metrics.jsonl" not in files or name not in Path(folder).parts:
                    continue
                with contextlib.suppress(OSError):
                    lines = Path(folder, "metrics.jsonl").read_bytes().splitlines(keepends=True)
                    whole = [line for line in lines[-2:] if line.endswith(b"}\n")]
                    if whole:
                        last = max(last, int(whole[-1].split(b":")[1].split(b",")[0]))
        return last

    def judge(self, name: str, *, where: str) -> tuple[bool, str]:
        """Compare a finished run with the calm one, in its records and in MLflow; return the verdict and the words."""
        if where == "bucket":
            (self.runs / name).mkdir()
            uri = f"s3://{self._bucket.replace('?', f'/runs/{name}?')}"
            self.services.start(
                [sys.executable, "-c", _DOWNLOAD, uri, str(self.runs / name)], self.folder / "s3.log"
            ).wait()
        log = self.folder / f"{name}.verdict"
        command = [sys.executable, "cluster/check_runs.py", str(self.runs), f"{CALM}={name}"]
        status = self.services.start(command, log, MLFLOW_TRACKING_URI=f"http://{self.services.address}:5000").wait()
        return status == 0, log.read_text().strip()

    def keep_broken(self, name: str) -> None:
        """Copy a run from its disk, which ends with the cluster, into the folder of the logs."""
        shutil.copytree(self.runs / name, self.folder / "broken" / name, ignore_dangling_symlinks=True)
        shutil.copytree(self.runs / CALM, self.folder / "broken" / CALM)

    def view_workers(self) -> list[psutil.Process]:
        """Return the view workers of all hosts."""
        return [process for host in (self.trainer, self.views) for process in host.processes(_VIEW_WORKER_TITLE)]

    def trainers(self) -> list[psutil.Process]:
        """Return the trainer, if it is there."""
        return self.trainer.processes(_TRAINER_TITLE)

    def fill_store(self) -> subprocess.Popen[bytes] | None:
        """Put more objects into the store of the view host than it holds, until the process is killed. None: it failed."""
        log = self.folder / "put.log"
        log.write_bytes(b"")
        process = self.views.start([sys.executable, "-c", _PUT_OBJECTS, f"{self.head.address}:6379"], log)
        deadline = time.monotonic() + _FULL_SECONDS
        while b"full" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                return None
            time.sleep(0.1)
        return process

    def fill_disk(self) -> Path:
        """Fill the disk of the runs; return the file that does it."""
        path = self.runs / "filling"
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**20))
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1))
        return path

    def _count_nodes(self) -> int:
        ask = f"import ray; ray.init('{self.head.address}:6379', log_to_driver=False, logging_level='ERROR')\n"
        ask += "print('alive', sum(node['Alive'] for node in ray.nodes()))"
        log = self.folder / "nodes.log"
        self.head.start([sys.executable, "-c", ask], log).wait()
        counts = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("alive ")]
        return int(counts[-1]) if counts else 0

    def _wait(self, what: str, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _FIRST_PATIENCE_SECONDS
        while not is_there():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{what} did not come up within {_FIRST_PATIENCE_SECONDS:.0f} s; logs are in {self.folder}"
                )
            time.sleep(1.0)


def write_images(folder: Path) -> None:
    """Write digits, and files that are no images, damaged, or bombs."""
    folder.mkdir()
    for sample_id, image in enumerate(DigitsSource().read(range(NUM_IMAGES))):
        (folder / f"{sample_id:04d}.png").write_bytes(image)
    whole = (folder / "0000.png").read_bytes()
    (folder / "cut off.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "a line\nbreak.png").write_bytes(bytes(255 - byte for byte in whole))
    (folder / "nowhere.png").symlink_to("missing.png")
    Image.new("1", (40_000, 40_000)).save(folder / "bomb.png")
    noise = np.random.default_rng(0).integers(0, 256, 5_000, dtype=np.uint8)
    (folder / "noise.jpg").write_bytes(b"\xff\xd8\xff" + noise.tobytes())


@contextlib.contextmanager
def chaos_cluster(folder: Path) -> Iterator[ChaosCluster]:
    """Make the cluster in a folder, whose runs lie on a small disk of their own; end it afterwards."""
    write_images(folder / "images")
    runs = folder / "runs"
    runs.mkdir()
    run(str(ROOT / "cluster" / "make_certificate.sh"), str(folder / "tls"))
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(os.urandom(32).hex())
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(folder / "tls" / "ca.crt"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "HVP_CPUS": "2",
        "HVP_STORE_BYTES": str(STORE_BYTES),
        "AWS_ACCESS_KEY_ID": "of-moto",
        "AWS_SECRET_ACCESS_KEY": "of-moto",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
    }
    run("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", str(runs))
    try:
        with hosts(["head", "trainer", "views", "services"], folder, environment) as named:
            cluster = ChaosCluster(folder, named)
            cluster.start()
            yield cluster
    finally:
        run("umount", "--lazy", str(runs))
