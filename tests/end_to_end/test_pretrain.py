"""pretrain.py as a user runs it: killed and started again, on odd images, with a small object store."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvp_ray.launch import ray_train
from hvp_ray.launch.driver import Watchers, launch
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.launch.stop import StoppedError, StopRequest
from hvp_ray.tracking.journal import read_journal
from hvp_ray.tracking.selection_analysis import read_selection_log
from pipelines.pretrain import main
from tests.helpers import encode, photograph_like, tiny_config
from tests.ray.runs import AtStep, attempts, digest_from_checkpoint, launch_quietly, recorded_steps

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

SUMMARY_FIELDS = (
    "run_name recipe method selection_rule seed num_steps num_epochs images_seen train_seconds images_per_second "
    "first_batch_seconds data_wait_fraction step_seconds_median spilled_bytes peak_memory_bytes num_unreadable_images "
    "num_worker_restarts num_resumes loss_first loss_last knn_top1 knn_top1_untrained knn5shot_top1 "
    "knn5shot_top1_untrained knn5shot_top1_pixels chosen_iou_mean other_iou_mean weights_digest run_identity mlflow_run_id"
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


def _start(output: Path, name: str, **extra: str) -> subprocess.Popen[str]:
    settings = SETTINGS | {key.replace("__", "."): value for key, value in extra.items()}
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    command = [sys.executable, "pipelines/pretrain.py", "--run.name", name, "--run.output", str(output), *options]
    # As on a company's machine: a proxy that must not be used for this machine's own addresses.
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": "localhost,127.0.0.1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | proxy,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _curve(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the k-NN during training: (step, values)."""
    return [(record["step"], record["metrics"]) for record in read_journal(run_dir / "evaluations.jsonl")]


def _wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 900
    while not any(recorded >= step for recorded in recorded_steps(run_dir)):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.005)


def test_pretrain_killed_and_started_again_ends_with_the_same_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of the driver in mid-run; then a complete run with MLflow, figures and summary."""
    inline_config = tiny_config(str(tmp_path), run={"name": "inline"}, tracking={"knn_every_epochs": 1})
    inline = pretrain_in_process(inline_config)
    assert inline is not None

    first = _start(tmp_path, "killed")
    _wait_for_step(tmp_path / "killed", 6, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()

    second = _start(tmp_path, "killed")
    printed = second.communicate(timeout=1800)[0]
    assert second.returncode == 0, printed
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert summary["weights_digest"] == inline["weights_digest"] == digest_from_checkpoint(tmp_path / "killed")
    assert summary["num_resumes"] == 1
    assert attempts(tmp_path / "killed")[1]["step"] in (4, 8, 12, 16)
    assert recorded_steps(tmp_path / "killed") == list(range(1, 21))
    assert _curve(tmp_path / "killed") == _curve(tmp_path / "inline")
    assert [step for step, _ in _curve(tmp_path / "killed")] == [0, 10, 20]
    killed_log, inline_log = (read_selection_log(tmp_path / name) for name in ("killed", "inline"))
    np.testing.assert_array_equal(killed_log.step, inline_log.step)
    np.testing.assert_array_equal(killed_log.scores, inline_log.scores)

    assert [name for name in SUMMARY_FIELDS.split() if name not in summary] == []
    assert [name for name in SUMMARY_FIELDS.split() if summary[name] is None] == []
    figures = sorted(path.name for path in (tmp_path / "killed" / "figures").iterdir())
    assert figures == ["candidate_views.png", "loss.png", "overlap.png"]
    for text in (
        "trained encoder",
        "untrained encoder",
        "raw pixels",
        "summary.json",
        "mlflow server",
        "data     digits",
    ):
        assert text in printed
    assert (tmp_path / "mlflow.db").exists()

    command = ["--run.name", "killed", "--run.output", str(tmp_path)]
    assert main(command) == 1
    assert "has finished with other settings" in (refusal := capfd.readouterr().err)
    assert "training.epochs: 2 -> 45" in refusal and "data.num_images: 200 -> None" in refusal
    assert main([*command, *(word for key, value in SETTINGS.items() for word in (f"--{key}", value))]) == 0
    assert "has ended already" in capfd.readouterr().out


@pytest.mark.usefixtures("ray_session")
def test_sigterm_stops_after_writing_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def stop(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    settings = SETTINGS | {"training.epochs": "400", "training.checkpoint_every_steps": "100000"}
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    stopper = AtStep(tmp_path / "stopped", [5], stop)
    stopper.start()
    status = main(["--run.name", "stopped", "--run.output", str(tmp_path), "--tracking.uri", "none", *options])
    stopper.end()
    assert status == 1
    printed = capfd.readouterr().err
    assert "stopped after writing a checkpoint" in printed
    assert "Traceback" not in printed
    assert len(list((tmp_path / "stopped" / "checkpoints").glob("step-*/manifest.json"))) == 1


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
    """The session's Ray has a store of 400 MiB; nothing is made before the refusal."""
    settings = SETTINGS | {
        "training.images_per_step": "150",
        "views.global_views.size_px": "128",
        "views.evaluation_resize_px": "128",
        "cluster.batches_in_flight": "30",
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    assert main(["--run.name", "small", "--run.output", str(tmp_path), *options]) == 1
    printed = capfd.readouterr().err
    assert "prefetching needs" in printed
    assert "set cluster.batches_in_flight=" in printed
    assert not (tmp_path / "small").exists()


def _odd_images(root: Path) -> None:
    """Two classes of healthy images, and in them one of every odd and of every damaged kind."""
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
    lines = (tmp_path / "odd" / "unreadable-rank-0.jsonl").read_text()
    for reason in ("0 bytes", "not an image", "data.max_image_pixels", "cannot be decoded"):
        assert reason in lines
    assert summary["knn_top1"] is None  # nothing was held out


@pytest.mark.usefixtures("ray_session")
def test_too_many_damaged_images_stop_the_run_with_the_numbers(tmp_path: Path) -> None:
    from hvp_ray.errors import TrainingError

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


@pytest.mark.usefixtures("ray_session")
def test_cifar10_runs_from_relative_parquet_paths_with_the_test_file(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cifar10)
    import dataclasses

    from hvp_ray.recipes import get_recipe

    recipe = get_recipe("simsiam-cifar10-small")
    config = dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, name="cifar", output=str(tmp_path)),
        data=dataclasses.replace(
            recipe.data,
            source="cifar10-train.parquet",
            test_source="cifar10-test.parquet",
            num_images=512,
        ),
        training=dataclasses.replace(recipe.training, epochs=1),
        cluster=dataclasses.replace(recipe.cluster, num_view_workers=1),
        tracking=dataclasses.replace(recipe.tracking, uri="none", knn_images=300, num_figure_images=2),
    )
    summary = launch_quietly(config)
    assert summary["num_steps"] == 4
    assert 0.1 < summary["knn_top1"] < 0.6
    assert (tmp_path / "cifar" / "figures" / "candidate_views.png").stat().st_size > 10_000
