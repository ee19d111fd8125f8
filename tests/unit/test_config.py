"""Config: strict, frozen, and back from JSON; identity: what may change a bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hvp_ray.config import (
    DataConfig,
    RunConfig,
    RunSettings,
    SelectionConfig,
    TransformConfig,
    ViewGroupConfig,
    config_from_dict,
    config_to_dict,
    flatten,
)
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.identity import describe_difference, identity_digest, identity_parts
from hvp_ray.recipes import RECIPES, get_recipe
from hvp_ray.training.preparation import mlflow_location
from pipelines.evaluate import read_config
from tests.helpers import tiny_config


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_survives_json_and_knows_its_name(name: str) -> None:
    config = get_recipe(name)
    assert config.recipe == name
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'simsiam-cifar10-small'"):
        get_recipe("simsiam-cifar10-smal")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelectionConfig(num_views=1), r"selection.num_views=1 is not allowed: 2 to 64"),
        (lambda: RunSettings(seed=-1), "run.seed=-1"),
        (lambda: RunSettings(name="../up"), "run.name='../up'"),
        (lambda: RunSettings(name=""), "run.name=''"),
        (lambda: DataConfig(source=""), "data.source"),
        (lambda: TransformConfig(crop_scale=(0.5, 0.2)), "crop_scale"),
        (lambda: TransformConfig(hue_turns=0.6), "hue_turns=0.6.*0 to 0.5"),
        (lambda: TransformConfig(blur_probability=1.5), "blur_probability=1.5"),
        (lambda: ViewGroupConfig(size_px=8, even=TransformConfig(blur_kernel_px=23)), "size_px=8"),
        (
            lambda: tiny_config("x", cluster={"num_trainers": 3}),
            "images_per_step=16.*multiple of cluster.num_trainers=3",
        ),
        (lambda: tiny_config("x", selection={"scoring_resolution_px": 64}), "scoring_resolution_px=64.*at most"),
        (lambda: tiny_config("x", training={"compile": True}, cluster={"device": "cpu"}), "training.compile"),
        (lambda: tiny_config("x", cluster={"object_store_mib": 3}), "object_store_mib"),
    ],
)
def test_wrong_values_say_path_value_and_what_is_allowed(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_config_of_another_version_is_refused() -> None:
    values = config_to_dict(get_recipe("simsiam-digits"))
    values["training"]["warp_speed"] = 9
    with pytest.raises(ConfigError, match="warp_speed"):
        config_from_dict(values)


def test_hard_steps_and_views_follow_every_and_score_always() -> None:
    every = SelectionConfig(every=3)
    assert [every.num_views_at(step) for step in range(4)] == [4, 2, 2, 4]
    assert SelectionConfig(rule="first").num_views_at(0) == 2
    assert SelectionConfig(rule="first", score_always=True).num_views_at(0) == 4


def _digest(config: RunConfig, **resolved: str) -> str:
    values = {"renderer": "cpu", "device": "cpu", "data_fingerprint": "f", "torch_version": "2.13.0"} | resolved
    return identity_digest(identity_parts(config, **values))


WITHOUT_EFFECT: list[dict[str, dict[str, Any]]] = [
    {"run": {"name": "x", "output": "elsewhere", "resume": False}},
    {"data": {"source": "moved", "block_cache_mib": 7, "max_row_group_mib": 7, "test_source": "t"}},
    {"training": {"checkpoint_every_steps": 9, "keep_checkpoints": 5}},
    {"cluster": {"num_view_workers": 7, "batches_in_flight": 9, "late_factor": 3.0}},
    {"tracking": {"uri": "http://127.0.0.1:1", "log_every_steps": 3}},
]
WITH_EFFECT: list[dict[str, dict[str, Any]]] = [
    {"run": {"seed": 1}},
    {"data": {"num_images": 100}},
    {"data": {"max_image_mib": 1}},
    {"data": {"max_image_pixels": 10_000}},
    {"data": {"intensity_range": (0.0, 4095.0)}},
    {"selection": {"rule": "first"}},
    {"optimizer": {"weight_decay": 0.1}},
    {"training": {"torch_threads": 2}},
    {"training": {"epochs": 3}},
    {"cluster": {"num_trainers": 2}},
]


@pytest.mark.parametrize("sections", WITHOUT_EFFECT)
def test_what_cannot_change_a_bit_does_not_change_the_identity(sections: dict[str, dict[str, Any]]) -> None:
    assert _digest(tiny_config("o", **sections)) == _digest(tiny_config("o"))


@pytest.mark.parametrize("sections", WITH_EFFECT)
def test_what_may_change_a_bit_changes_the_identity(sections: dict[str, dict[str, Any]]) -> None:
    assert _digest(tiny_config("o", **sections)) != _digest(tiny_config("o"))


def test_renderer_device_data_and_torch_are_part_of_the_identity() -> None:
    base = _digest(tiny_config("o"))
    for change in ({"renderer": "dali-cpu"}, {"device": "cuda"}, {"data_fingerprint": "g"}, {"torch_version": "2.14"}):
        assert _digest(tiny_config("o"), **change) != base


def test_difference_names_both_values() -> None:
    assert describe_difference({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 -> 3", "c: None -> 4"]


def test_configs_are_frozen_and_flatten_to_dotted_names() -> None:
    config = tiny_config("o")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 3  # type: ignore[misc]
    flat = flatten(config_to_dict(config))
    assert flat["selection.num_views"] == 4
    assert flat["views.global_views.even.crop_scale"] == (0.6, 1.0)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://me:hunter2@host:5000", "before the @.*MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("HTTPS://hunter2@host/path", "before the @.*MLFLOW_TRACKING_PASSWORD"),
        ("http://me:hun/ter2@host", "before the @"),
        ("postgresql+psycopg2://me:hunter2@db:5432/mlflow", "before the @.*PGPASSWORD"),
        ("mysql://db/mlflow?user=me&password=hunter2", "'password'"),
        ("s3://AKIA:hunter2@bucket/x", "before the @.*AWS_SECRET_ACCESS_KEY"),
        ("s3://bucket/x?secret_key=hunter2", "'secret_key'.*AWS_SECRET_ACCESS_KEY"),
        ("https://host/x?X-Amz-Signature=hunter2", "'X-Amz-Signature'"),
        ("https://host/x?sig=hunter2", "'sig'"),
        ("gs://bucket/x?access_token=hunter2", "'access_token'.*GOOGLE_APPLICATION_CREDENTIALS"),
        ("hf://me:hunter2@datasets/x", "before the @"),
    ],
)
@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("tracking", "uri"),
        ("data", "source"),
        ("data", "test_source"),
        ("run", "output"),
        ("training", "initial_weights"),
    ],
)
def test_passwords_and_keys_in_uris_are_refused_and_not_repeated(
    section: str, name: str, uri: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{section}.{name} carries credentials.*{message}") as refusal:
        tiny_config("x", **{section: {name: uri}})
    assert "ter2" not in str(refusal.value)
    values = config_to_dict(tiny_config("x"))
    values[section][name] = uri
    with pytest.raises(ConfigError, match="carries credentials"):
        config_from_dict(values)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "http://host:5000/users/me@home",
        "https://[::1]:5000/x",
        "postgresql://me@db:5432/mlflow",
        "sqlite:////home/me:you@home/mlflow.db",
        "file:///data/a:b@c",
        "s3://bucket/x?endpoint_override=host:9000&scheme=http",
        "gs://anonymous@bucket/x",
        "abfs://box@account.dfs.core.windows.net/x",
        "hf://datasets/cifar10@main/x.parquet",
        "/data/me:you@home/x",
        "auto",
    ],
)
def test_what_holds_no_secret_is_taken(uri: str) -> None:
    assert tiny_config("x", tracking={"uri": uri}).tracking.uri == uri
    assert tiny_config("x", data={"source": uri}).data.source == uri


def test_password_in_the_environments_tracking_uri_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host:5000")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI carries credentials.*MLFLOW_TRACKING_PASSWORD"):
        mlflow_location(tiny_config("x", tracking={"uri": "auto"}), tmp_path)


def test_config_of_a_run_imports_nothing_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('proof').touch()\n")
    values = config_to_dict(tiny_config("x"))
    for name in ("evil:Config", "os:system", "hvp_ray.config:RunConfig", "..evil:x", "", "subprocess:Popen"):
        values["method"]["type"] = name
        (tmp_path / "config.json").write_text(json.dumps({"config": values}))
        with pytest.raises(ConfigError, match="names the method"):
            read_config(tmp_path)
    for text in ("[" * 100_000, "{}", "[]", '{"config": []}', "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises((CheckpointError, ConfigError)):
            read_config(tmp_path)
    assert not (tmp_path / "proof").exists()
