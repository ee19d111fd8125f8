"""Other versions of libraries: refused with the way out, allowed if only pixels could differ and do not, or accepted."""

import dataclasses
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvp_ray import identity
from hvp_ray.cli.pretrain import describe_result
from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.identity import ACCEPTED_VERSIONS, identity_of
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.job import RunJob
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.rank import build_order
from hvp_ray.runs.record import finished_summary, summary_of
from hvp_ray.runs.render_sample import RenderedSample, render_sample
from hvp_ray.runs.versions import describe_versions, record_versions, versions_by_step
from tests.helpers import resolved_of, tiny_config
from tests.unit.data.made import draw_images, write_folder, write_parquet

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that lets libraries have other versions: their names, with `_` for `-`, and versions."""
    true_version = importlib.metadata.version

    def pretend(**versions: str) -> None:
        known = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: known.get(name) or true_version(name))
        identity._version.cache_clear()

    yield pretend
    monkeypatch.undo()
    identity._version.cache_clear()


def _config(folder: Path, *, accept: bool = False, name: str = "r", **sections: dict[str, object]) -> RunConfig:
    training = {"num_steps": 6, "checkpoint_every_steps": 2}
    run = {"name": name, "accept_versions": accept}
    return tiny_config(str(folder), **({"run": run, "training": training} | sections))


def _prepare(config: RunConfig, **options: Any) -> RunJob:
    return prepare_run(config, resolve_inline(config.cluster), **options)


def _start(config: RunConfig) -> RunJob:
    """Prepare a run, and do what its first trainer does once it owns the run."""
    job = _prepare(config)
    record_versions(job.location, job.other_versions)
    return job


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "r" / "config.json").read_text())
    return record


def _change_record(folder: Path, **entries: object) -> None:
    (folder / "r" / "config.json").write_text(json.dumps(_record(folder) | entries))


def _train(config: RunConfig) -> dict[str, Any]:
    summary = pretrain_in_process(config)
    assert summary is not None and summary["problems"] == []
    return summary


def _back_to(step: int, folder: Path) -> None:
    """Make a finished run one that died after the checkpoint of a step."""
    for path in (folder / "r" / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (folder / "r" / "summary.json").unlink()


def test_library_that_changes_more_than_pixels_is_refused_and_the_way_out_is_named(
    tmp_path: Path, install: Install
) -> None:
    _prepare(_config(tmp_path))
    before = _record(tmp_path)
    install(numpy="0.1", pillow="0.2")
    message = (
        r"(?s)numpy: '.+' -> '0\.1'\n.*pillow: .* no pixel changed\. Install its .* give --run\.accept_versions True"
    )
    with pytest.raises(CheckpointError, match=message):
        _prepare(_config(tmp_path))
    assert _record(tmp_path) == before


def test_accepted_versions_resume_to_the_bits_of_the_run_because_the_libraries_are_in_truth_the_same(
    tmp_path: Path, install: Install
) -> None:
    straight = _train(_config(tmp_path))
    identity_before = _record(tmp_path)["identity"]
    assert straight["other_versions"] is None
    _back_to(4, tmp_path)
    install(numpy="0.1")
    with pytest.raises(CheckpointError, match=r"--run\.accept_versions"):
        _train(_config(tmp_path))
    accepted = _config(tmp_path, accept=True, tracking={"num_figure_images": 1})  # for the page
    resumed = _train(accepted)
    assert resumed["weights_digest"] == straight["weights_digest"]
    assert resumed["run_identity"] == straight["run_identity"]
    assert _record(tmp_path)["identity"] == identity_before
    change = {"step": 4, "versions": {"numpy": "0.1"}, "pixels_equal": True}
    assert resumed["other_versions"] == [change]
    sentence = "from step 4: numpy 0.1. Equal bits are no longer promised from step 4."
    assert sentence in (tmp_path / "r" / "report.html").read_text()
    assert sentence in describe_result(resumed | {"spilled_bytes": 0}, accepted, "folder", None)

    _back_to(4, tmp_path)
    again = _train(_config(tmp_path))
    assert again["weights_digest"] == straight["weights_digest"]
    assert again["other_versions"] == [change]
    assert finished_summary(_config(tmp_path)) == again
    install(numpy="0.1", timm="0.1")
    _back_to(4, tmp_path)
    with pytest.raises(CheckpointError, match=r"timm: .* -> '0\.1'"):
        _prepare(_config(tmp_path))
    install()
    back = _train(_config(tmp_path))
    assert back["other_versions"] is None  # all steps of other versions were trained again
    assert back["weights_digest"] == straight["weights_digest"]


def test_other_torch_is_accepted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _prepare(_config(tmp_path))
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    with pytest.raises(CheckpointError, match=r"torch: .* -> '9\.9\.0'"):
        _prepare(_config(tmp_path))
    after = _prepare(_config(tmp_path, accept=True))
    assert after.run_identity == before.run_identity
    assert after.other_versions is not None and after.other_versions.versions == {"torch": "9.9.0"}


def test_library_that_only_makes_pixels_is_allowed_by_itself_if_none_changed(
    tmp_path: Path, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    straight = _train(_config(tmp_path))
    _back_to(4, tmp_path)
    install(pillow="0.1", simplejpeg="0.2")
    with caplog.at_level(logging.WARNING):
        resumed = _train(_config(tmp_path))
    (warning,) = [r.getMessage() for r in caplog.records if "continues with other versions" in r.getMessage()]
    assert "-> '0.1'; simplejpeg: " in warning and warning.endswith("were rendered again: no pixel changed.")
    assert resumed["weights_digest"] == straight["weights_digest"]
    versions = {"pillow": "0.1", "simplejpeg": "0.2"}
    assert resumed["other_versions"] == [{"step": 4, "versions": versions, "pixels_equal": True}]
    assert str(describe_versions(resumed["other_versions"])).endswith("promised as far as this sample shows.")


def test_changed_pixels_are_refused_and_recorded_if_accepted(tmp_path: Path, install: Install) -> None:
    job = _prepare(_config(tmp_path))
    _change_record(tmp_path, rendering=_record(tmp_path)["rendering"] | {"sha256": "of other pixels"})
    install(pillow="0.1")
    with pytest.raises(CheckpointError, match=r"(?s)pillow: .*pixels changed\..*--run\.accept_versions"):
        _prepare(_config(tmp_path))
    accepted = _start(_config(tmp_path, accept=True))
    assert accepted.run_identity == job.run_identity
    assert accepted.other_versions is not None and accepted.other_versions.pixels_equal is False
    later = _prepare(_config(tmp_path))
    assert later.other_versions is not None and later.other_versions.pixels_equal is False
    assert _record(tmp_path)["rendering"]["sha256"] == "of other pixels"


def test_pixels_after_accepted_versions_are_compared_with_the_start(tmp_path: Path, install: Install) -> None:
    """An accepted torch and then a patch of Pillow that changes no pixel."""
    _prepare(_config(tmp_path))
    install(timm="0.1")
    _start(_config(tmp_path, accept=True))
    install(timm="0.1", pillow="0.1")
    job = _start(_config(tmp_path))
    assert job.other_versions is not None and job.other_versions.versions == {"timm": "0.1", "pillow": "0.1"}
    install(timm="0.2", pillow="0.1")
    with pytest.raises(CheckpointError, match="timm"):
        _prepare(_config(tmp_path))


def test_run_without_a_sample_has_no_automatic_way_and_gets_one_from_its_own_versions(
    tmp_path: Path, install: Install
) -> None:
    _prepare(_config(tmp_path))
    record = _record(tmp_path)
    rendering = record.pop("rendering")
    (tmp_path / "r" / "config.json").write_text(json.dumps(record))
    install(pillow="0.1")
    with pytest.raises(
        CheckpointError, match="not compared: the run was started by a version of hvp_ray that recorded no"
    ):
        _prepare(_config(tmp_path))
    install()
    _prepare(_config(tmp_path))
    assert _record(tmp_path)["rendering"] == rendering
    install(pillow="0.1")
    _prepare(_config(tmp_path))


def test_settings_are_never_accepted(tmp_path: Path, install: Install) -> None:
    _prepare(_config(tmp_path))
    install(pillow="0.1")
    other = _config(tmp_path, accept=True, data={"test_fraction": 0.3})
    with pytest.raises(CheckpointError, match=r"(?s)with other settings.*test_fraction"):
        _prepare(other)


def test_ranks_that_only_read_take_the_identity_of_the_start_too(tmp_path: Path, install: Install) -> None:
    job = _prepare(_config(tmp_path))
    install(pillow="0.1")
    before = _record(tmp_path)
    reader = _prepare(_config(tmp_path), is_writer=False)
    assert reader.run_identity == job.run_identity
    assert _record(tmp_path) == before
    install(numpy="0.1")
    assert _prepare(_config(tmp_path), is_writer=False).run_identity != job.run_identity


def test_runs_of_a_comparison_accept_no_other_version(tmp_path: Path, install: Install) -> None:
    config = _config(tmp_path)
    own = identity_of(config, resolved_of(config))
    _prepare(config, planned=own)
    install(pillow="0.1")
    with pytest.raises(CheckpointError, match="pillow"):
        _prepare(config, planned=identity_of(config, resolved_of(config)))
    _prepare(config)  # alone it may, because no pixel changed; until it owns the run it changes nothing
    assert ACCEPTED_VERSIONS not in _record(tmp_path)
    _start(config)
    install()
    (tmp_path / "r" / "summary.json").write_text("{}")
    assert summary_of(config, own) is None
    with pytest.raises(CheckpointError, match=r"accepted_versions: \[\{'pillow': '0\.1'\}\] -> None"):
        _prepare(config, planned=own)
    _prepare(config)


def _sample(config: RunConfig, **options: Any) -> RenderedSample:
    dataset = open_dataset(config.data)
    options = {"renderer": "cpu", "search_crashing": False} | options
    return render_sample(config, dataset, build_order(config, dataset), **options)


@pytest.mark.parametrize("recipe", ["simsiam-digits", "dino-digits"])
def test_sample_is_a_digest_of_the_pixels_whoever_renders_it(tmp_path: Path, recipe: str) -> None:
    config = tiny_config(str(tmp_path), recipe)
    sample = _sample(config)
    assert sample.num_images == 8 and sample.reason is None
    assert _sample(config) == _sample(config, search_crashing=True) == sample
    more = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, num_trainers=2))
    assert _sample(more) == sample
    local = config.views.local_views
    group = "local_views" if local is not None else "global_views"
    even = dataclasses.replace(getattr(config.views, group).even, jitter_probability=0.0)
    views = dataclasses.replace(config.views, **{group: dataclasses.replace(getattr(config.views, group), even=even)})
    assert _sample(dataclasses.replace(config, views=views)).sha256 != sample.sha256


def test_sample_of_damaged_images_is_of_their_replacements_or_says_why_there_is_none(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    source = write_folder(tmp_path / "images", draw_images(12, generator))
    data = {"source": str(source), "num_images": None, "test_fraction": 0.0, "max_unreadable_fraction": 0.9}
    config = _config(tmp_path, data=data, training={"images_per_step": 8}, tracking={"knn_images": 0})
    whole = _sample(config)
    files = sorted(source.rglob("*.png"))
    for path in files[:6]:
        path.write_bytes(b"damaged")
    part = _sample(config)
    assert None not in (whole.sha256, part.sha256) and part.sha256 != whole.sha256
    for path in files:
        path.write_bytes(b"damaged")
    none = _sample(config)
    assert none.sha256 is None and "no readable image was found" in str(none.reason)
    job = _prepare(config)
    assert _record(tmp_path)["rendering"] == none.to_dict() and job.other_versions is None
    dali = _sample(config, renderer="dali-gpu")
    assert dali.sha256 is None and "this run has dali-gpu" in str(dali.reason)


def test_sample_of_blocks_reads_one_block(tmp_path: Path, generator: np.random.Generator) -> None:
    source = write_parquet(tmp_path / "images.parquet", draw_images(60, generator), row_group_size=10)
    config = _config(tmp_path, data={"source": str(source), "num_images": None, "test_fraction": 0.0})
    dataset = open_dataset(config.data)
    assert dataset.source.reads_whole_blocks
    assert set(dataset.training_ids[:8].tolist()) == set(range(8))
    assert _sample(config).sha256 is not None


def test_changes_of_versions_are_those_of_steps_that_count() -> None:
    new, newer = ({"versions": {"torch": version}, "pixels_equal": True} for version in ("2", "3"))

    def of(*attempts: tuple[int, dict[str, Any] | None]) -> list[tuple[int, Any]] | None:
        records = [{"step": step} | ({} if used is None else {"other_versions": used}) for step, used in attempts]
        found = versions_by_step(records)
        return None if found is None else [(change["step"], change["versions"].get("torch")) for change in found]

    assert of((0, None), (4, None)) is None
    assert of((0, None), (4, new), (8, new)) == [(4, "2")]
    assert of((0, None), (4, new), (8, newer)) == [(4, "2"), (8, "3")]
    assert of((0, None), (4, new), (4, None)) is None
    assert of((0, None), (4, new), (8, None)) == [(4, "2"), (8, None)]
    assert of((0, None), (0, new)) == [(0, "2")]
    assert describe_versions(None) is None
    changes = versions_by_step([{"step": 4, "other_versions": new}, {"step": 8}])
    assert "from step 4: torch 2; from step 8: those of its start again." in str(describe_versions(changes))
    pixels = {"versions": {"pillow": "2"}, "pixels_equal": True}
    changes = versions_by_step([{"step": 4, "other_versions": pixels}, {"step": 8}])
    assert "equal bits are promised as far as this sample shows" in str(describe_versions(changes))


def test_setting_is_refused_in_a_comparison(tmp_path: Path) -> None:
    from hvp_ray.comparison.study import open_study

    config = _config(tmp_path, accept=True)
    with pytest.raises(ConfigError, match=r"run\.accept_versions=True is not allowed"):
        open_study(
            config,
            open_dataset(config.data),
            name=None,
            arm_names=["vanilla"],
            seeds=[0],
            accounting="counted",
            measure=lambda _names: {},
        )
