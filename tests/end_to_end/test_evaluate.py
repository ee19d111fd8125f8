"""evaluate.py as a user runs it: on the run's own data, on another data set, and with wrong arguments."""

import json
from pathlib import Path

import pytest

from hvp_ray.training.local import pretrain_in_process
from pipelines.evaluate import main
from tests.helpers import encode, photograph_like, tiny_config

import numpy as np  # isort: skip


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
        words = [
            "--checkpoint",
            str(run_dir),
            "--protocol",
            "knn",
            "logistic",
            "--neighbours",
            "20",
            "--json",
            str(path),
        ]
        assert main(words) == 0
        results.append(json.loads(path.read_text()))
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    rows = [{row["protocol"]: row["accuracy"] for row in result["results"]} for result in results]
    assert rows[0] == rows[1]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert rows[0]["knn"] == pytest.approx(summary["knn_top1"])
    assert len(list((run_dir / "features").glob("*.npz"))) == 2


def test_transfer_to_a_folder_of_other_classes(run_dir: Path, tmp_path: Path) -> None:
    """Light images against dark ones: any encoder tells them apart."""
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "{run}/nothing"], "expected the folder of a run"),
        (["--checkpoint", "{run}", "--last-blocks", "4"], "last_blocks"),
        (["--checkpoint", "{run}", "--data", "{run}/nothing"], "does not exist"),
    ],
)
def test_wrong_arguments_are_said_in_a_line(
    run_dir: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(run=run_dir) for word in words]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and "Traceback" not in printed
