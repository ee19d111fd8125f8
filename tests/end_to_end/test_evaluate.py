"""Run evaluate.py as a user does: on the run's own data, on another data set, and with wrong arguments."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvp_ray.cli.evaluate import main
from hvp_ray.data.digits import DigitsSource
from hvp_ray.launch.local import pretrain_in_process
from tests.helpers import encode, photograph_like, tiny_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    tracking = {"knn_images": 10_000, "knn_neighbours": 20}
    pretrain_in_process(tiny_config(str(output), run={"name": "one"}, training={"num_steps": 5}, tracking=tracking))
    return output / "one"


def test_k_nn_is_that_of_the_run_and_features_are_cached(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for attempt in ("first", "second"):
        path = tmp_path / f"{attempt}.json"
        words = ["--checkpoint", str(run_dir), "--protocol", "knn", "logistic", "--neighbours", "20"]
        assert main([*words, "--json", str(path)]) == 0
        results.append(json.loads(path.read_text()))
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    rows = [{row["protocol"]: row["accuracy"] for row in result["results"]} for result in results]
    assert rows[0] == rows[1]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert rows[0]["knn"] == pytest.approx(summary["knn_top1"])
    assert len(list((run_dir / "features").glob("*.npz"))) == 2


def test_transfer_to_a_folder_of_other_classes(run_dir: Path, tmp_path: Path) -> None:
    """Any encoder separates light images from dark ones."""
    generator = np.random.default_rng(0)
    for index in range(40):
        folder = tmp_path / "images" / ("dark", "light")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = photograph_like(generator, 20, 24) // 4 + (0, 180)[index % 2]
        (folder / f"{index}.png").write_bytes(encode(pixels.astype(np.uint8)))
    path = tmp_path / "numbers.json"
    words = ["--checkpoint", str(run_dir), "--protocol", "logistic", "--data", str(tmp_path / "images")]
    assert main([*words, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["results"]
    assert row["accuracy"] == 1.0


def _evaluate(run_dir: Path, tmp_path: Path, *words: object) -> dict[str, Any]:
    path = tmp_path / "numbers.json"
    assert main(["--checkpoint", str(run_dir), *map(str, words), "--neighbours", "20", "--json", str(path)]) == 0
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_own_images_given_by_name_are_split_as_in_the_run(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run has 200 of the digits. After a new split of all digits, it would have trained on most held-out images."""
    result = _evaluate(run_dir, tmp_path, "--data", "digits")
    assert (result["num_training_images"], result["num_test_images"]) == (160, 40)
    assert result["num_test_images_trained_on"] == 0
    assert result["results"][0]["accuracy"] == json.loads((run_dir / "summary.json").read_text())["knn_top1"]
    assert "the run's own split is used" in capsys.readouterr().out


def _write_digits(folder: Path, ids: range, *, without: int | None = None) -> Path:
    source = DigitsSource()
    for sample_id in ids:
        label = int(source.load_labels()[sample_id])
        if label != without:
            path = folder / f"digit-{label}" / f"{sample_id:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read([sample_id])[0])
    return folder


@pytest.fixture(scope="module")
def run_on_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on 80 images in `training`, with 40 test images in `test`; return the folder that holds both and the run."""
    here = tmp_path_factory.mktemp("folders")
    data = {
        "source": str(_write_digits(here / "training", range(80))),
        "test_source": str(_write_digits(here / "test", range(80, 120))),
        "num_images": None,
    }
    pretrain_in_process(tiny_config(str(here), run={"name": "one"}, data=data, training={"num_steps": 2}))
    return here


def test_moved_images_of_a_run_are_recognised_by_their_content(run_on_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(run_on_folders / "training")
    result = _evaluate(run_on_folders / "one", tmp_path, "--data", tmp_path / "moved")
    assert (result["num_training_images"], result["num_test_images"]) == (80, 40)
    assert result["data"]["test_source"] == str(run_on_folders / "test")


def test_test_images_that_were_trained_on_are_counted(
    run_on_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", run_on_folders / "test", "--test-data", run_on_folders / "training")
    result = _evaluate(run_on_folders / "one", tmp_path, *words)
    assert (result["num_training_images"], result["num_test_images"]) == (40, 80)
    assert result["num_test_images_trained_on"] == 80
    assert "80 of 80 test images were trained on by this run" in capsys.readouterr().out
    # Whether the run trained on images of another name is unknown.
    assert _evaluate(run_on_folders / "one", tmp_path, "--data", "digits")["num_test_images_trained_on"] is None


def test_images_that_changed_since_the_run_are_reported(
    run_on_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = run_on_folders / "training" / "digit-0" / "added.png"
    added.write_bytes(DigitsSource().read([0])[0])
    try:
        _evaluate(run_on_folders / "one", tmp_path)
    finally:
        added.unlink()
    assert "changed since the run" in capsys.readouterr().out


def test_test_images_are_matched_to_classes_by_name(
    run_on_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = _write_digits(tmp_path / "training", range(80), without=0)
    result = _evaluate(run_on_folders / "one", tmp_path, "--data", training)
    whole = _evaluate(run_on_folders / "one", tmp_path, "--data", training, "--test-data", run_on_folders / "test")
    num_zeros = int((DigitsSource().load_labels()[80:120] == 0).sum())
    assert whole["num_test_images"] == 40 - num_zeros and result["num_test_images_trained_on"] is None
    assert f"{num_zeros} of 40 labelled test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "{run}/nothing"], "expected the folder of a run"),
        (["--checkpoint", "{run}", "--last-blocks", "4"], "last_blocks"),
        (["--checkpoint", "{run}", "--data", "{run}/nothing"], "does not exist"),
        (["--checkpoint", "{run}", "--data", "digits", "--test-data", "digits"], "are the same images"),
    ],
)
def test_wrong_arguments_end_with_one_line(
    run_dir: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(run=run_dir) for word in words]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and "Traceback" not in printed
