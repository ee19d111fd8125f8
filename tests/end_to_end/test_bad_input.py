"""Wrong input ends with a sentence that says what to do and exit status 1 or 2; no traceback, and no file is written."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvp_ray.cli.describe import main as describe
from hvp_ray.cli.pretrain import main
from tests.helpers import encode

ROOT = Path(__file__).parents[2]


def _run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run pretrain.py's main in this process; return its exit status and output."""
    try:
        status = main(list(arguments))
    except SystemExit as error:  # tyro ends the program itself
        status = int(error.code or 0)
    captured = capfd.readouterr()
    printed = captured.out + captured.err
    assert "Traceback" not in printed
    return status, " ".join(printed.replace("│", " ").split())


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_text("no image")
    (tmp_path / "few" / "a").mkdir(parents=True)
    for index in range(5):
        (tmp_path / "few" / "a" / f"{index}.png").write_bytes(encode(np.zeros((9, 9, 3), np.uint8)))
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    pq.write_table(pa.table({"vector": [b"x"]}), tmp_path / "column.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.source", "{}/absent"],
            "does not exist; expected `digits`, a folder of images, Parquet, WebDataset (.tar)",
        ),
        (["--data.source", "{}/empty"], "no images in"),
        (["--data.source", "{}/texts"], "(1 files of other kinds); expected `digits`, a folder of images"),
        (["--data.source", "{}/broken.parquet"], "cannot be read as Parquet"),
        (["--data.source", "{}/column.parquet"], "has no column of images; it has ['vector']"),
        (["--data.source", "{}/few"], "the data has 4 images for training, fewer than one step needs"),
        (["--data.test_source", "{}/few"], "no class of the test images is one of the training images"),
        (["--data.test_source", "digits"], "training and test images are the same images"),
        (["--data.num_images", "5000"], "the source has only 1797 images"),
        (["--run.output", "foo://bucket/runs"], "is not a storage that can be used"),
        (["--run.output", "s3://me:secret@bucket/runs"], "run.output carries credentials"),
        (["simsiam-digit"], "did you mean 'simsiam-digits'"),
        (["--trainig.epochs", "3"], "--training.epochs"),
        (["--selection.rule", "hardes"], "Expected one of ('hardest', 'first'"),
        (["--selection.num_views", "1"], "selection.num_views=1 is not allowed: 2 to 64"),
        (["--run.seed", "-4"], "run.seed=-4"),
        (["--selection.num_global_views", "4"], "selection.num_views=4 is not allowed: None with"),
        (["dino-digits", "--selection.num_views", "4"], "selection.num_views=4 is not allowed: None with"),
        (["dino-digits", "--selection.num_chosen_local_views", "9"], "1 to selection.num_local_views=4"),
        (["ibot-digits", "--views.masks.patch_px", "5"], "views.masks.patch_px=5 is not allowed: a divisor"),
        (["ibot-digits", "--views.local_views.size_px", "9"], "a multiple of the patch size, 4 px"),
        (["ibot-digits", "--selection.scoring_resolution_px", "10"], "a multiple of the patch size, 4 px"),
        (["ibot-digits", "--views.masks.patch_px", "8"], "the patches of the encoder are 4 px wide"),
        (["ibot-digits", "--method.backbone.channels", "1", "2", "3", "4"], "does not fit vit_tiny_patch16_224"),
        (["--training.accumulation_steps", "5"], "training.accumulation_steps=5 is not allowed: a divisor"),
        (["no.module:recipe"], "cannot be imported"),
        (["--training.images_per_step", "63", "--cluster.num_trainers", "2"], "a multiple of cluster.num_trainers=2"),
        (["--recipe", "other"], "--recipe is set by the first argument"),
        (["--method.backbone.name", "resnet19"], "not known to timm"),
        (["--training.initial_weights", "{}/absent"], "there is no file"),
        (["--cluster.batches_in_flight", "100000000"], "set cluster.batches_in_flight="),
    ],
)
def test_is_refused_with_a_sentence_before_anything_starts(
    capfd: pytest.CaptureFixture[str], sources: Path, arguments: list[str], message: str
) -> None:
    before = sorted(sources.rglob("*"))
    output = [] if "--run.output" in arguments else ["--run.output", str(sources / "runs")]
    status, printed = _run(capfd, *[argument.format(sources) for argument in arguments], *output)
    assert status in (1, 2)
    assert message in printed
    assert sorted(sources.rglob("*")) == before


def test_output_folder_that_cannot_be_written_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    status, printed = _run(capfd, "--run.output", str(file / "runs"))
    assert status == 1
    assert "cannot be written" in printed
    if os.getuid() != 0:  # root may write anywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert "cannot be written" in _run(capfd, "--run.output", str(tmp_path / "runs"))[1]
        tmp_path.chmod(stat.S_IRWXU)


def test_help_lists_recipes_and_options(capfd: pytest.CaptureFixture[str]) -> None:
    status, printed = _run(capfd, "--help")
    assert status == 0
    for text in (
        "simsiam-imagenet-r50-100ep",
        "--selection.num_views {None}|INT",
        "--cluster.batches_in_flight INT|{auto}",
    ):
        assert text in printed


def test_example_of_an_own_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "new_method.md").read_text()
    example = page.split("## In your own training loop")[1].split("```python\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 24
    exec(compile(example, "new_method.md", "exec"), {"__name__": "__main__"})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert all(-1.0 <= loss <= 1.0 for loss in losses)


def test_describe_says_what_a_run_needs_and_starts_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe(["dino-digits", "--training.images_per_step", "16"]) == 0
    printed = capfd.readouterr().out
    for text in (
        "digits, scikit-learn's digits: 1,797 images, 10 classes, 1.2 MB, 1,438 to train on, 359 held out for evaluation",
        "4 global views of 8 px and 4 local views of 6 px",
        "chosen among 36 candidates",
        "random steps",
        "PEAK",
    ):
        assert text in printed
    assert "give --link" in printed
    pool = printed.split("cluster.ship  ")[-1]
    # 4 x 8 x 8 x 3 + 4 x 6 x 6 x 3 = 1.2 kB of views; workers and links follow from what is measured here and now
    assert [line.split()[1] for line in pool.splitlines() if line.startswith("  views")] == ["1"]
    assert describe(["dino-digits", "--training.images_per_step", "16", "--demand", "1e6", "--link", "10"]) == 0
    assert "recommended    --cluster.ship views   (views fit the link: 10 GB/s)" in capfd.readouterr().out
    assert describe(["dino-digits", "--training.images_per_step", "16", "--demand", "1e6", "--link", "0.001"]) == 0
    assert "WARNING        neither fits 80% of a link of 0.001 GB/s: at most " in capfd.readouterr().out
    with pytest.raises(SystemExit):  # tyro ends the program itself
        describe(["dino-digits", "--link", "fast"])
    assert "--link" in capfd.readouterr().err
    assert describe(["dino-digits", "--demand", "0"]) == 1
    assert "--demand=0.0 is not allowed: above 0" in capfd.readouterr().err
    assert describe(["dino-digit"]) == 1
    assert "did you mean 'dino-digits'" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
