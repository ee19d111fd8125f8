"""A run goes on, or counts as finished, only as the run that it is: same training images, same order, same evaluation."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.identity import identity_of
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.location import for_all_nodes
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.rank import RunJob
from hvp_ray.runs.record import finished_summary, summary_of
from tests.helpers import resolved_of, tiny_config
from tests.unit.data.made import draw_images, write_folder


def _config(folder: Path, **sections: dict[str, object]) -> RunConfig:
    return tiny_config(str(folder), **({"run": {"name": "r"}} | sections))


def _prepare(config: RunConfig) -> RunJob:
    return prepare_run(config, resolve_inline(config.cluster))


@pytest.fixture
def test_images(tmp_path: Path, generator: np.random.Generator) -> Path:
    return write_folder(tmp_path / "test", draw_images(12, generator))


@pytest.mark.parametrize("starts_with_test_source", [True, False])
def test_resume_that_would_train_on_other_images_is_refused(
    tmp_path: Path, test_images: Path, *, starts_with_test_source: bool
) -> None:
    """Without `data.test_source` a fifth of the training images is held out; with it, none is."""
    held_out = _config(tmp_path)
    separate = _config(tmp_path, data={"test_source": str(test_images)})
    first, second = (separate, held_out) if starts_with_test_source else (held_out, separate)
    _prepare(first)
    with pytest.raises(CheckpointError, match=r"(?s)training images: .*data\.test_source: .*test"):
        _prepare(second)
    _prepare(first)


def test_summary_without_a_record_is_of_no_known_run(tmp_path: Path) -> None:
    config = _config(tmp_path)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "summary.json").write_text("{}")
    assert summary_of(config, identity_of(config, resolved_of(config))) is None
    for use in (finished_summary, _prepare):
        with pytest.raises(CheckpointError, match=r"no config\.json.*--run\.name"):
            use(config)
    assert not (tmp_path / "r" / "config.json").exists()


def test_run_that_is_not_the_planned_one_is_refused_before_it_trains(tmp_path: Path, test_images: Path) -> None:
    config = _config(tmp_path, data={"test_source": str(test_images)})
    planned = identity_of(config, resolved_of(config))
    next(test_images.rglob("*.png")).unlink()
    with pytest.raises(CheckpointError, match=r"not be the planned one.*test data: "):
        prepare_run(config, resolve_inline(config.cluster), planned=planned)
    assert not (tmp_path / "r").exists()
    prepare_run(config, resolve_inline(config.cluster), planned=identity_of(config, resolved_of(config)))


def test_moved_data_is_the_same_data(tmp_path: Path, test_images: Path) -> None:
    _prepare(_config(tmp_path, data={"test_source": str(test_images)}))
    moved = test_images.rename(tmp_path / "moved")
    _prepare(_config(tmp_path, data={"test_source": str(moved)}))


def test_resume_with_other_test_images_is_refused(
    tmp_path: Path, test_images: Path, generator: np.random.Generator
) -> None:
    others = write_folder(tmp_path / "others", draw_images(9, generator))
    _prepare(_config(tmp_path, data={"test_source": str(test_images)}))
    with pytest.raises(CheckpointError, match=r"test images: .* -> "):
        _prepare(_config(tmp_path, data={"test_source": str(others)}))


@pytest.mark.parametrize(
    "tracking",
    [{"knn_neighbours": 1}, {"knn_images": 30}, {"selection_images_per_epoch": 16}, {"log_every_steps": 2}],
)
def test_resume_that_would_mix_two_protocols_in_one_curve_is_refused(
    tmp_path: Path, tracking: dict[str, object]
) -> None:
    _prepare(_config(tmp_path))
    (name,) = tracking
    with pytest.raises(CheckpointError, match=f"tracking.{name}: "):
        _prepare(_config(tmp_path, tracking=tracking))


def test_resume_may_change_what_changes_no_number(tmp_path: Path) -> None:
    before = _prepare(_config(tmp_path))
    after = _prepare(
        _config(
            tmp_path,
            data={"block_cache_mib": 7, "max_unreadable_fraction": 0.5},
            training={"checkpoint_every_steps": 3},
            cluster={"num_view_workers": 5},
            tracking={"knn_every_epochs": 1, "num_figure_images": 2},
        )
    )
    assert before.run_identity == after.run_identity


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    config = _config(tmp_path_factory.mktemp("runs"), training={"num_steps": 2})
    summary = pretrain_in_process(config)
    assert summary is not None
    return config, summary


def _changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_finished_run_is_found_by_its_name_and_settings(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = finished
    assert finished_summary(config) == summary
    assert finished_summary(_changed(config, "cluster", num_view_workers=3)) == summary
    assert finished_summary(_changed(config, "run", name="another")) is None


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("optimizer", {"learning_rate_per_256": 0.123}, r"optimizer.learning_rate_per_256: .* -> 0.123"),
        ("training", {"num_steps": 3}, r"training.num_steps: 2 -> 3"),
        ("data", {"test_fraction": 0.3}, r"(?s)training images: .*data.test_fraction: 0.2 -> 0.3"),
        ("cluster", {"device": "cuda"}, r"device: 'cpu' -> 'cuda'"),
        ("tracking", {"knn_neighbours": 1}, r"tracking.knn_neighbours: 20 -> 1"),
    ],
)
def test_finished_run_with_other_settings_is_refused_with_the_difference(
    finished: tuple[RunConfig, dict[str, Any]], section: str, values: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        finished_summary(_changed(finished[0], section, **values))


def test_finished_run_counts_after_an_upgrade_of_the_libraries(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path
) -> None:
    """Nothing is computed again, so only the question must be the same; a resume is refused."""
    config = _changed(finished[0], "run", output=str(tmp_path))
    folder = tmp_path / "r"
    folder.mkdir()
    content = (Path(str(finished[0].run.output)) / "r" / "config.json").read_text()
    record = json.loads(content)
    record["identity"]["torch"] = record["identity"]["numpy"] = "0.1"
    record["run_identity"] = "of those versions"
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "summary.json").write_text(json.dumps(finished[1]))
    assert finished_summary(config) == finished[1]
    with pytest.raises(CheckpointError, match=r"(?s)numpy: '0.1' -> .*torch: '0.1' -> "):
        _prepare(config)


def test_damaged_summary_is_refused_in_words(finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    config = _changed(finished[0], "run", output=str(tmp_path))
    shutil.copytree(Path(str(finished[0].run.output)) / "r", tmp_path / "r")
    (tmp_path / "r" / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged .*; delete it"):
        finished_summary(config)


@pytest.mark.parametrize("content", ["of an earlier version", "{}", "{"])
def test_folder_of_an_earlier_version_is_refused_in_words(tmp_path: Path, content: str) -> None:
    config = _config(tmp_path)
    _prepare(config)
    path = tmp_path / "r" / "config.json"
    if content == "of an earlier version":
        record = json.loads(path.read_text())
        del record["evaluation"], record["identity"]["training images"]
        content = json.dumps(record)
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json .*--run\.name"):
        _prepare(config)
    (tmp_path / "r" / "summary.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json .*--run\.name"):
        finished_summary(config)


def test_data_that_is_open_is_not_opened_again_and_only_the_writer_counts_it(tmp_path: Path, test_images: Path) -> None:
    data = {"source": str(test_images), "num_images": None}
    config = _config(tmp_path, data=data, training={"images_per_step": 4})
    dataset = open_dataset(config.data)
    test_images.rename(tmp_path / "moved")
    job = prepare_run(config, resolve_inline(config.cluster), dataset=dataset)
    assert job.inventory is not None and job.inventory.source.num_images == 12
    reader = prepare_run(config, resolve_inline(config.cluster), dataset=dataset, is_writer=False)
    assert reader.inventory is None and reader.run_identity == job.run_identity


def test_folder_and_server_that_the_environment_names_are_settled_for_all_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    config = for_all_nodes(tiny_config("runs", tracking={"uri": "auto"}))
    assert (config.run.output, config.tracking.uri) == (str(tmp_path / "runs"), "http://127.0.0.1:1")
    config = for_all_nodes(tiny_config("s3://bucket/prefix"))
    assert (config.run.output, config.tracking.uri) == ("s3://bucket/prefix", "none")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:cret@127.0.0.1:1")
    with pytest.raises(ConfigError):
        for_all_nodes(tiny_config("runs", tracking={"uri": "auto"}))
