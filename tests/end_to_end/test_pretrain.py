"""Run pretrain.py as a user does: to the end, killed and started again, on odd images, with a small object store."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hvp_ray.cli.pretrain import main
from hvp_ray.errors import TrainingError
from hvp_ray.launch import ray_train
from hvp_ray.launch.driver import Watchers, launch
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.launch.stop import StoppedError, StopRequest
from hvp_ray.recipes import get_recipe
from hvp_ray.tracking.logged_pairs import read_selection_log
from hvp_ray.tracking.run_log import EVALUATIONS, read_records
from tests.helpers import encode, photograph_like, tiny_config
from tests.ray.runs import AtStep, attempts, digest_from_checkpoint, launch_quietly, recorded_steps
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]

SUMMARY_FIELDS = (
    "run_name recipe method selection_rule seed num_steps num_epochs images_seen train_seconds images_per_second "
    "first_batch_seconds data_wait_fraction step_seconds_median spilled_bytes peak_memory_bytes num_unreadable_images "
    "num_worker_restarts num_resumes loss_first loss_last knn_top1 knn_top1_untrained knn5shot_top1 "
    "knn5shot_top1_untrained knn5shot_top1_pixels num_knn_training_images num_knn_test_images "
    "chosen_iou_mean other_iou_mean weights_digest run_identity mlflow_run_id"
)


SETTINGS = {
    "data.num_images": "200",
    "training.epochs": "2",
    "training.images_per_step": "16",
    "training.checkpoint_every_steps": "4",
    "tracking.knn_images": "40",
    "tracking.log_every_steps": "1",
    "tracking.knn_every_epochs": "1",
    "cluster.num_view_workers": "1",
    "cluster.batches_in_flight": "3",
}


def _options(output: Path, name: str, **changed: str) -> list[str]:
    """Return the command line of a small run; `a__b` sets `a.b`."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return ["--run.name", name, "--run.output", str(output), *words]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def inline(output: Path) -> Path:
    """Train without Ray; return the run's folder."""
    config = tiny_config(str(output), run={"name": "inline"}, tracking={"knn_every_epochs": 1})
    assert pretrain_in_process(config) is not None
    return output / "inline"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run of pretrain.py that has ended."""

    run_dir: Path
    printed: str

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary


@pytest.fixture(scope="module")
def finished(ray_session: None, output: Path) -> Finished:
    """Run pretrain.py on the session's Ray: images decoded by a view worker and rendered by a finisher, MLflow, figures."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(_options(output, "finished", cluster__ship="pixels")) == 0
    return Finished(run_dir=output / "finished", printed=printed.getvalue())


def _check_equal_to_inline(run_dir: Path, inline: Path) -> None:
    """Check weights, journal, k-NN during training and log of choices."""
    digests = [json.loads((folder / "summary.json").read_text())["weights_digest"] for folder in (run_dir, inline)]
    assert digests[0] == digests[1] == digest_from_checkpoint(run_dir)
    assert recorded_steps(run_dir) == list(range(1, 21))
    curve, inline_curve = (
        [(record["step"], record["metrics"]) for record in read_records(folder, EVALUATIONS)]
        for folder in (run_dir, inline)
    )
    assert curve == inline_curve
    assert [step for step, _ in curve] == [0, 10, 20]
    log, inline_log = read_selection_log(run_dir), read_selection_log(inline)
    np.testing.assert_array_equal(log["step"], inline_log["step"])
    np.testing.assert_array_equal(log["scores"], inline_log["scores"])


def test_pretrain_gives_the_weights_curve_and_choices_of_a_run_without_ray(finished: Finished, inline: Path) -> None:
    _check_equal_to_inline(finished.run_dir, inline)


def test_finished_run_has_a_summary_figures_and_an_mlflow_store_and_prints_where(finished: Finished) -> None:
    summary = finished.summary
    assert [name for name in SUMMARY_FIELDS.split() if summary.get(name) is None] == []
    figures = {path.name for path in (finished.run_dir / "figures").iterdir()}
    drawn = ("candidate_views", "collapse", "knn", "loss", "neighbours", "overlap")
    assert figures == {f"{name}.png" for name in drawn}
    for text in (
        "trained encoder",
        "untrained encoder",
        "raw pixels",
        "summary.json",
        "mlflow server",
        "data     digits",
    ):
        assert text in finished.printed
    assert (finished.run_dir.parent / "mlflow.db").exists()


def test_finished_run_is_not_done_again_and_refuses_other_settings(
    finished: Finished, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = ["--run.name", "finished", "--run.output", str(output)]
    assert main(["simsiam-digits", *named]) == 1
    assert "has finished with other settings" in (refusal := capfd.readouterr().err)
    assert "training.epochs: 2 -> 45" in refusal and "data.num_images: 200 -> None" in refusal
    for words in (_options(output, "finished"), named):
        assert main(words) == 0
        assert "has ended already" in capfd.readouterr().out
    assert len(attempts(finished.run_dir)) == 1


@pytest.mark.long
@pytest.mark.ray
def test_pretrain_killed_and_started_again_ends_with_the_same_weights(output: Path, inline: Path) -> None:
    """SIGKILL the driver in mid-run. Programs with a Ray of their own, because Ray ends with its driver."""

    def start() -> subprocess.Popen[str]:
        # As on a company's machine: a proxy that must not be used for this machine's own addresses.
        proxies = ("http_proxy", "https_proxy")
        proxy = dict.fromkeys(proxies, "http://127.0.0.1:9") | {"no_proxy": "localhost,127.0.0.1"}
        return subprocess.Popen(
            [sys.executable, "pipelines/pretrain.py", *_options(output, "killed")],
            cwd=ROOT,
            env=os.environ | proxy,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    run_dir = output / "killed"
    first = start()
    wait_until(lambda: max(recorded_steps(run_dir), default=0) >= 6 or first.poll() is not None, "step 6", pause=0.005)
    assert first.poll() is None, first.communicate()[0]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (run_dir / "summary.json").exists()

    second = start()
    printed = second.communicate(timeout=1800)[0]
    assert second.returncode == 0, printed
    _check_equal_to_inline(run_dir, inline)
    assert json.loads((run_dir / "summary.json").read_text())["num_resumes"] == 1
    assert attempts(run_dir)[1]["step"] in (4, 8, 12, 16)
    assert "trained encoder" in printed


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_sigterm_stops_a_run_after_writing_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def stop(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    endless = {"training__epochs": "400", "training__checkpoint_every_steps": "100000", "tracking__uri": "none"}
    stopper = AtStep(tmp_path / "stopped", [5], stop)
    stopper.start()
    status = main(_options(tmp_path, "stopped", **endless))
    stopper.end()
    assert status == 1
    printed = capfd.readouterr().err
    assert "stopped after writing a checkpoint" in printed
    assert "Traceback" not in printed
    assert len(list((tmp_path / "stopped" / "checkpoints").glob("step-*/manifest.json"))) == 1


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_stop_without_patience_ends_ray_train_before_the_driver_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_train, "END_SECONDS", 0.0)  # its trainers would end by themselves in a second
    config = tiny_config(str(tmp_path), run={"name": "stopped"}, training={"epochs": 100_000, "keep_checkpoints": 1})
    stop = StopRequest()
    asker = AtStep(tmp_path / "stopped", [5], lambda _step: stop.ask(patience_seconds=-1.0))
    asker.start()
    nothing = Watchers(announce=lambda _: None, show_progress=lambda _: None, show_message=lambda _: None)
    with pytest.raises(StoppedError):
        launch(config, nothing, stop=stop)
    asker.end()
    assert "ray-train" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.usefixtures("ray_session")
def test_small_object_store_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The session's Ray has an object store of 400 MiB; nothing is written before the refusal."""
    large = {
        "training__images_per_step": "150",
        "views__global_views__size_px": "128",
        "views__evaluation_resize_px": "128",
        "cluster__batches_in_flight": "30",
    }
    assert main(_options(tmp_path, "small", **large)) == 1
    printed = capfd.readouterr().err
    assert "prefetching needs" in printed
    assert "set cluster.batches_in_flight=" in printed
    assert not (tmp_path / "small").exists()


def _odd_images(root: Path) -> None:
    """Write two classes of healthy images, and one image of every odd and of every damaged kind among them."""
    generator = np.random.default_rng(0)
    for index in range(60):
        folder = root / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = photograph_like(generator, 24 + index % 7, 30)
        (folder / f"{index:02d}.jpg").write_bytes(encode(pixels, "JPEG"))
    rgb = photograph_like(generator, 30, 40)
    exif = Image.Exif()
    exif[0x0112] = 8
    cmyk, gif = io.BytesIO(), io.BytesIO()
    Image.fromarray(rgb).convert("CMYK").save(cmyk, "JPEG")
    Image.fromarray(rgb).save(gif, "GIF", save_all=True, append_images=[Image.fromarray(rgb[::-1])])
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    odd = {
        "alpha.png": encode(np.dstack([rgb, rgb[..., 0]])),
        "cmyk.jpg": cmyk.getvalue(),
        "sixteen.png": encode(rgb[..., 0].astype(np.uint16) * 257),
        "turned.jpg": encode(rgb, "JPEG", exif=exif),
        "turned.tif": encode(rgb, "TIFF", exif=exif),
        "animated.gif": gif.getvalue(),
        "one_px_wide.png": encode(rgb[:, :1]),
    }
    damaged = {
        "truncated.jpg": encode(rgb, "JPEG", quality=98)[:-400],
        "empty.jpg": b"",
        "text.jpg": b"this is a text file named .jpg",
        "bomb.png": bomb.getvalue(),
    }
    for name, content in (odd | damaged).items():
        (root / "class0" / name).write_bytes(content)


@pytest.mark.parametrize("renderer", ["cpu", "dali-cpu"])
def test_odd_images_are_used_and_damaged_ones_replaced_and_listed(tmp_path: Path, renderer: str) -> None:
    _odd_images(tmp_path / "images")
    config = tiny_config(
        str(tmp_path),
        run={"name": "odd"},
        data={
            "source": str(tmp_path / "images"),
            "num_images": None,
            "test_fraction": 0.0,
            "intensity_range": (0.0, 65_535.0),
        },
        training={"epochs": 3},
        cluster={"renderer": renderer},
    )
    summary = pretrain_in_process(config)
    assert summary is not None
    assert summary["num_unreadable_images"] == 4
    assert summary["num_steps"] == 3 * (71 // 16)
    lines = "".join(path.read_text() for path in (tmp_path / "odd" / "log").glob("*/unreadable-rank-0.jsonl"))
    for reason in ("0 bytes", "not an image", "data.max_image_pixels", "cannot be decoded"):
        assert reason in lines
    assert summary["knn_top1"] is None  # nothing was held out


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_too_many_damaged_images_stop_the_run_with_the_numbers(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for index in range(100):
        content = encode(photograph_like(generator, 20, 20)) if index % 10 else b"damaged"
        (folder / f"{index}.png").write_bytes(content)
    config = tiny_config(
        str(tmp_path),
        run={"name": "damaged"},
        data={"source": str(tmp_path / "images"), "num_images": None, "test_fraction": 0.0},
        training={"epochs": 15},
    )
    with pytest.raises(
        TrainingError, match=r"images are unreadable \(.*%\), more than data.max_unreadable_fraction=0.01"
    ):
        launch_quietly(config)
    # A thread that still calls Ray can crash the driver at its end.
    assert "ray-train" not in {thread.name for thread in threading.enumerate()}
    assert os.path.exists(tmp_path / "damaged" / "checkpoints" / "step-00000060" / "manifest.json")


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_cifar10_runs_from_relative_parquet_paths_with_the_test_file(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cifar10)
    recipe = get_recipe("simsiam-cifar10-small")
    config = dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, name="cifar", output=str(tmp_path)),
        data=dataclasses.replace(
            recipe.data,
            source="cifar10-train.parquet",
            test_source="cifar10-test.parquet",
            num_images=256,
        ),
        training=dataclasses.replace(recipe.training, epochs=1),
        cluster=dataclasses.replace(recipe.cluster, num_view_workers=1),
        tracking=dataclasses.replace(recipe.tracking, uri="none", knn_images=200, num_figure_images=2),
    )
    summary = launch_quietly(config)
    assert summary["num_steps"] == 2
    assert 0.1 < summary["knn_top1"] < 0.6
    assert (tmp_path / "cifar" / "figures" / "candidate_views.png").stat().st_size > 10_000
