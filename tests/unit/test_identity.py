"""Every field of the config: it is part of what two runs, or the runs of a comparison, must share, or it changes nothing.

Fields whose value is part of the identity need no proof, so any value does. All others are in `CHANGES` with an allowed
value, which must show in the identity by its result, or leave training images, order, views and weights as they are.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvp_ray.comparison.study import settings_of
from hvp_ray.config import RunConfig, config_from_dict, config_to_dict, flatten
from hvp_ray.data.dataset import open_dataset
from hvp_ray.identity import Effect, Resolved, describe_difference, effect_of, identity_of
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.recipes import get_recipe
from hvp_ray.runs.checkpoint import CheckpointStore
from hvp_ray.runs.rank import build_order
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.render_batch import build_render_context, render_batch
from hvp_ray.tracking.run_log import EVALUATIONS, read_records
from hvp_ray.tracking.selection_log import selection_files
from hvp_ray.training.trainee import Checkpoint
from tests.helpers import resolved_of, tiny_config
from tests.unit.data.made import draw_images, write_parquet

RECIPES = ("simsiam-digits", "simclr-digits", "dino-digits", "ibot-digits")

CHANGES: dict[str, Any] = {
    "run.name": "another",
    "run.output": "ELSEWHERE",
    "run.resume": False,
    "run.accept_versions": True,
    "data.source": "MOVED",
    "data.num_images": 40,
    "data.test_source": "OTHERS",
    "data.test_fraction": 0.4,
    "data.max_unreadable_fraction": 0.5,
    "data.shuffle_window_images": 8,
    "data.shuffle_window_mib": 1,
    "data.block_cache_mib": 1,
    "data.max_row_group_mib": 1,
    "data.image_column": "image",
    "data.label_column": "coarse_label",
    "views.evaluation_resize_px": 12,
    "views.evaluation_interpolation": "bicubic",
    "training.activation_checkpointing": True,
    "training.checkpoint_every_steps": 3,
    "training.keep_checkpoints": 1,
    "training.max_collapsed_steps": 1000,
    "training.initial_weights": "WEIGHTS",
    "training.initial_run": "RUN",
    "cluster.num_trainers": 2,
    "cluster.min_trainers": 1,
    "cluster.resize_check_seconds": 1.0,
    "cluster.placement": "anywhere",
    "cluster.num_view_workers": 3,
    "cluster.max_view_workers": 3,
    "cluster.renderer": "dali-cpu",
    "cluster.device": "cuda",
    "cluster.batches_in_flight": 9,
    "cluster.cpus_per_trainer": 0.5,
    "cluster.cpus_per_view_worker": 0.5,
    "cluster.ship": "pixels",
    "cluster.finishers_per_trainer": 2,
    "cluster.gpus_for_knn": 0.5,
    "cluster.gpus_per_trainer": 0.5,
    "cluster.gpus_per_dali_worker": 0.2,
    "cluster.object_store_mib": 100,
    "cluster.late_factor": 3.0,
    "cluster.late_seconds": 3.0,
    "cluster.stall_seconds": 30.0,
    "cluster.max_trainer_failures": 0,
    "tracking.uri": "none",
    "tracking.loggers": ("tensorboard",),
    "tracking.experiment": "another",
    "tracking.log_every_steps": 2,
    "tracking.knn_neighbours": 1,
    "tracking.knn_images": 15,
    "tracking.knn_every_epochs": 2,
    "tracking.selection_images_per_epoch": 8,
    "tracking.comparison": "c",
    "tracking.arm": "vanilla",
    "tracking.num_figure_images": 1,
}


def _fields(config: RunConfig) -> list[str]:
    return [name for name in flatten(config_to_dict(config)) if name != "method.type"]  # the class, no field


def _with_any(config: RunConfig, name: str) -> RunConfig:
    """A config with a value that nothing else has; checks are bypassed."""
    changed = config_from_dict(config_to_dict(config))
    *sections, field = name.split(".")
    owner: Any = changed
    for section in sections:
        owner = getattr(owner, section)
    object.__setattr__(owner, field, "of the test")
    return changed


def _compared(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """The identity of the weights, and what the runs of a comparison have in common."""
    resolved = resolved_of(config)
    return identity_of(config, resolved).digest, settings_of(config, resolved, "steps", "measured")


class _Made:
    """A run on Parquet of six row groups, with labels of two kinds."""

    def __init__(self, folder: Path) -> None:
        generator = np.random.default_rng(0)
        self.folder = folder
        source = write_parquet(folder / "images.parquet", draw_images(60, generator), row_group_size=10)
        table = pq.read_table(source)
        coarse = pa.array(np.arange(60) // 30, pa.int64())
        pq.write_table(table.append_column("coarse_label", coarse), source, row_group_size=10)
        (folder / "moved").mkdir()
        shutil.copy(source, folder / "moved")
        write_parquet(folder / "others.parquet", draw_images(20, generator), row_group_size=10)
        self.places = {
            "ELSEWHERE": folder / "elsewhere",
            "MOVED": folder / "moved" / "images.parquet",
            "OTHERS": folder / "others.parquet",
            "WEIGHTS": folder / "backbone.safetensors",
            "RUN": folder / "run",
        }
        self.places["WEIGHTS"].write_bytes(b"some weights")
        checkpoints = CheckpointStore(str(folder / "run" / "checkpoints"), run_identity="a", keep=1)
        checkpoints.write(Checkpoint(step=1, method={}, optimizer={"state": {}, "param_groups": []}))
        self.base = tiny_config(
            str(folder),
            run={"name": "base"},
            data={"source": str(source), "num_images": None},
            training={"num_steps": 12, "images_per_step": 8},
            tracking={"knn_every_epochs": 1, "knn_images": 30},
        )
        self.drawn = list(_draw(self.base))
        self._compared = _compared(self.base)
        self._shows: dict[str, tuple[bool, bool]] = {}

    def changed(self, *names: str) -> RunConfig:
        """The base with these fields changed, all of them at once."""
        sections: dict[str, dict[str, Any]] = {}
        for name in names:
            section, field = name.split(".")
            value = CHANGES[name]
            sections.setdefault(section, {})[field] = (
                str(self.places.get(value, value)) if value in self.places else value
            )
        if "cluster.finishers_per_trainer" in names:
            sections["cluster"]["ship"] = "pixels"
        changed = {n: dataclasses.replace(getattr(self.base, n), **values) for n, values in sections.items()}
        return dataclasses.replace(self.base, **changed)

    def shows(self, name: str) -> tuple[bool, bool]:
        """Whether a changed field changes the identity of the weights, and what a comparison's runs have in common."""
        if name not in self._shows:
            digest, settings = _compared(self.changed(name))
            self._shows[name] = (digest != self._compared[0], settings != self._compared[1])
        return self._shows[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> _Made:
    return _Made(tmp_path_factory.mktemp("identity"))


def _draw(config: RunConfig) -> Iterator[bytes]:
    """Training images, two epochs of their order, and the views of a step of each epoch."""
    dataset = open_dataset(config.data)
    order = build_order(config, dataset)
    yield dataset.training_ids.tobytes()
    yield from (order.epoch_order(epoch).tobytes() for epoch in (0, 1))
    request_of = requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})
    context = build_render_context(config, dataset, "cpu")
    for step in (0, order.steps_per_epoch):
        batch = render_batch(context, request_of(step))
        yield batch.sample_ids.tobytes()
        yield hashlib.sha256(np.ascontiguousarray(batch.global_views.pixels)).digest()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_field_is_classified_and_all_that_is_not_compared_by_value_is_tried(recipe: str) -> None:
    fields = _fields(get_recipe(recipe))
    by_value = {name for name in fields if effect_of(name) is Effect.WEIGHTS}
    assert set(fields) - by_value == set(CHANGES)
    with pytest.raises(LookupError, match=r"identity\.py does not classify the config field cluster\.new_field"):
        effect_of("cluster.new_field")


@pytest.mark.parametrize("recipe", RECIPES)
def test_fields_compared_by_value_change_identity_and_comparison(recipe: str) -> None:
    base = get_recipe(recipe)
    resolved = resolved_of(base)
    digest, settings = identity_of(base, resolved).digest, settings_of(base, resolved, "steps", "measured")
    for name in set(_fields(base)) - set(CHANGES):
        changed = _with_any(base, name)
        assert identity_of(changed, resolved).digest != digest, name
        assert (settings_of(changed, resolved, "steps", "measured") != settings) == (name != "run.seed"), name


@pytest.mark.parametrize("name", CHANGES)
def test_field_changes_the_identity_or_no_image_no_order_and_no_view(made: _Made, name: str) -> None:
    of_weights, of_comparison = made.shows(name)
    assert of_comparison or not of_weights
    if not of_weights:
        assert list(_draw(made.changed(name))) == made.drawn


@pytest.mark.slow
def test_fields_outside_the_identity_change_no_weight_and_those_outside_a_comparison_no_metric(made: _Made) -> None:
    """All at once. What only Ray's processes do with theirs is shown by tests/ray/test_bit_equality.py.

    Checkpointed activations need a network without BatchNorm: tests/unit/training/test_step.py.
    """
    shows = {name: made.shows(name) for name in CHANGES if name != "training.activation_checkpointing"}
    neither = [name for name, shown in shows.items() if shown == (False, False)]
    of_metrics = [name for name, shown in shows.items() if shown == (False, True)]
    assert len(neither) > 25
    assert len(of_metrics) > 5
    runs = {"base": made.base, "neither": made.changed(*neither), "metrics": made.changed(*of_metrics)}
    for name, config in runs.items():
        runs[name] = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    folders = {name: Path(str(config.run.output)) / name for name, config in runs.items()}
    summaries = {name: pretrain_in_process(config) for name, config in runs.items()}
    assert len({summary["weights_digest"] for summary in summaries.values() if summary}) == 1
    assert _reported(folders["neither"]) == _reported(folders["base"])
    assert _reported(folders["metrics"]) != _reported(folders["base"])


def _reported(folder: Path) -> dict[str, Any]:
    """What a comparison's report has of a run: metrics, the points of the curve that all of them have, choices."""
    summary = json.loads((folder / "summary.json").read_text())
    measured = ("knn", "num_steps", "num_epochs", "images_seen", "loss", "chosen", "other", "num_collapse")
    curve = {record["step"]: record["metrics"] for record in read_records(folder, EVALUATIONS)}
    choices = pq.read_table(selection_files(folder)).sort_by([("step", "ascending"), ("sample_id", "ascending")])
    return {
        "summary": {name: value for name, value in summary.items() if name.startswith(measured)},
        "curve": [curve[step] for step in (0, 12)],
        "choices": choices.replace_schema_metadata(None).to_pydict(),
    }


def test_other_data_renderer_device_weights_and_torch_change_the_identity(made: _Made) -> None:
    resolved = resolved_of(made.base)
    digest = identity_of(made.base, resolved).digest
    changes: list[dict[str, Any]] = [
        {"renderer": "dali-cpu"},
        {"device": "cuda"},
        {"training_data": resolved.training_data | {"training data": "others"}},
        {"initial_weights": "others"},
        {"torch_version": "0.1"},
    ]
    assert set().union(*changes) == {field.name for field in dataclasses.fields(Resolved)} - {"test_data"}
    for change in changes:
        assert identity_of(made.base, dataclasses.replace(resolved, **change)).digest != digest
    moved = dataclasses.replace(resolved, test_data=resolved.test_data | {"test images": "others"})
    assert identity_of(made.base, moved).digest == digest
    assert identity_of(made.base, moved).evaluation != identity_of(made.base, resolved).evaluation


def test_an_elastic_run_is_the_same_with_other_numbers_of_trainers() -> None:
    configs = [tiny_config("o", cluster={"num_trainers": n, "min_trainers": 1}) for n in (1, 2)]
    assert len({identity_of(config, resolved_of(config)).digest for config in configs}) == 1
    fixed = tiny_config("o")
    assert identity_of(fixed, resolved_of(fixed)).digest != identity_of(configs[0], resolved_of(configs[0])).digest


def test_difference_names_both_values_and_the_settings_that_other_data_result_from() -> None:
    assert describe_difference({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}, {}, {}) == ["b: 2 -> 3", "c: None -> 4"]
    before, now = (
        {"data.test_source": None, "data.block_cache_mib": 1},
        {"data.test_source": "x", "data.block_cache_mib": 2},
    )
    assert describe_difference({"device": "cpu"}, {"device": "cuda"}, before, now) == ["device: 'cpu' -> 'cuda'"]
    assert describe_difference({"training images": "1"}, {"training images": "2"}, before, now) == [
        "training images: '1' -> '2'",
        "data.test_source: None -> 'x'",
    ]
