"""Config: strict, frozen, and back from JSON."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest

from hvp_ray.cli.command_line import parse_run
from hvp_ray.config import (
    BackboneConfig,
    Checked,
    DataConfig,
    Limits,
    MethodConfig,
    Range,
    RunSettings,
    SelectionConfig,
    TransformConfig,
    ViewGroupConfig,
    config_from_dict,
    config_to_dict,
    deferred_checks,
    flatten,
)
from hvp_ray.config.checks import describe, hints_of
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.methods.configs import SimSiamConfig
from hvp_ray.recipes import get_recipe
from hvp_ray.runs.find import read_config
from hvp_ray.runs.location import mlflow_location
from tests.helpers import tiny_config


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
        (
            lambda: BackboneConfig(name="resnet18", drop_path=2.0),
            "method.backbone.drop_path=2.0 is not allowed: 0 to 1",
        ),
        (
            lambda: SimSiamConfig(backbone=BackboneConfig(name="resnet18"), projector_dim=0),
            "method.projector_dim=0 is not allowed: 1 or more",
        ),
        (lambda: TransformConfig(crop_scale=(0.5, 0.2)), r"TransformConfig\.crop_scale=\(0.5, 0.2\)"),
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
        (
            lambda: tiny_config("x", selection={"reuse_student": True}, training={"accumulation_steps": 2}),
            "selection.reuse_student=True is not allowed: False without training.accumulation_steps=1",
        ),
        (
            lambda: tiny_config("x", training={"cuda_graphs": True}),
            "training.cuda_graphs=True.*without training.compile",
        ),
        (
            lambda: tiny_config("x", training={"compile": True, "activation_checkpointing": True}),
            "training.activation_checkpointing=True is not allowed: False with training.compile=True",
        ),
        (
            lambda: tiny_config("x", selection={"reuse_student": True, "scoring_resolution_px": 4}),
            "selection.reuse_student=True is not allowed: False without scoring at full resolution",
        ),
        (
            lambda: tiny_config("x", selection={"reuse_student": True, "scoring_precision": "bfloat16"}),
            "in the precision of training",
        ),
    ],
)
def test_wrong_values_say_path_value_and_what_is_allowed(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


TRANSFORMS = ("global_views.even", "global_views.odd", "local_views.even")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("crop_scale", (0.5, 0.2), "min <= max, both above 0 and at most 1"),
        ("hue_turns", 0.6, "0 to 0.5"),
        ("blur_kernel_px", 4, "an odd number"),
        ("blur_kernel_px", 4097, r"its half must be smaller than views\.(global|local)_views\.size_px="),
        ("interpolation", "nearest", r"bilinear \| bicubic"),
        ("flip_probability", "often", "0 to 1"),
    ],
)
def test_message_names_the_transform_whose_value_is_wrong(transform: str, field: str, value: Any, allowed: str) -> None:
    values = config_to_dict(get_recipe("dino-imagenet-vits16-100ep"))
    group, of_views = transform.split(".")
    values["views"][group][of_views][field] = value
    message = rf"^views\.{transform}\.{field}={re.escape(repr(value))} is not allowed: {allowed}"
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_command_line_names_the_transform_whose_value_is_wrong(transform: str) -> None:
    options = ["dino-imagenet-vits16-100ep", f"--views.{transform}.crop_scale", "0.5", "0.2"]
    with pytest.raises(ConfigError, match=rf"views\.{transform}\.crop_scale=\(0\.5, 0\.2\) is not allowed"):
        parse_run(options, program="hvp-ray pretrain", description="")


def test_every_value_of_a_recipe_is_in_the_range_of_its_field_and_values_of_other_types_are_in_none() -> None:
    for section in _sections(get_recipe("ibot-imagenet-vits16-100ep")):
        for name, hint in hints_of(type(section)).items():
            assert describe(hint), name
            with deferred_checks():
                wrong = dataclasses.replace(section, **{name: object()})
            with pytest.raises(ConfigError, match=rf"\.{name}=<object .* is not allowed: {re.escape(describe(hint))}"):
                dataclasses.replace(wrong)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _OfAUser(MethodConfig):
    """A method's config with ranges, other annotations, and an own check that replaces the package's."""

    name: ClassVar[str] = "of a user"
    width: Annotated[int, "for others", Range(least=1)] = 1
    kind: Annotated[str, "for others"] = "a"
    table: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check nothing."""


def test_ranges_of_a_users_method_are_checked_by_the_run_even_if_the_method_checks_nothing() -> None:
    recipe = get_recipe("simsiam-digits")
    method = _OfAUser(backbone=recipe.method.backbone, table={"a": 1})
    assert dataclasses.replace(recipe, method=method).method is method
    with pytest.raises(ConfigError, match="^method.width=0 is not allowed: 1 or more"):
        dataclasses.replace(recipe, method=dataclasses.replace(method, width=0))
    with pytest.raises(ConfigError, match="^method.kind=1 is not allowed: str"):
        dataclasses.replace(recipe, method=_with_field(method, "kind", 1))


def _with_field(section: Any, name: str, value: Any) -> Any:
    changed = dataclasses.replace(section)
    object.__setattr__(changed, name, value)
    return changed


def _sections(section: Any) -> Iterator[Any]:
    for field in dataclasses.fields(section):
        if isinstance(value := getattr(section, field.name), Checked):
            yield value
            yield from _sections(value)


@pytest.mark.parametrize(
    ("limits", "text", "allowed", "refused"),
    [
        (Range(least=1), "1 or more", (1, 2, math.inf), (0, math.nan)),
        (Range(above=0, most=1), "above 0 and at most 1", (1e-9, 1), (0, 1.1, math.nan)),
        (Range(least=0, below=1), "0 or more and below 1", (0, 0.999), (-1e-9, 1, math.nan)),
        (
            Limits(least=0, most=1),
            "min <= max, both 0 to 1",
            ((0, 1), (1, 1)),
            ((1, 0), (-1, 0), (0, 2), (0, math.nan)),
        ),
    ],
)
def test_range_includes_exactly_the_ends_that_it_says(limits: Range, text: str, allowed: Any, refused: Any) -> None:
    assert str(limits) == text
    assert all(map(limits.allows, allowed))
    assert not any(map(limits.allows, refused))


def test_config_of_another_version_is_refused() -> None:
    values = config_to_dict(get_recipe("simsiam-digits"))
    values["training"]["warp_speed"] = 9
    with pytest.raises(ConfigError, match="warp_speed"):
        config_from_dict(values)


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        (
            {"rule": "easiest", "quantile": 0.9},
            "selection.quantile=0.9 is not allowed: 1.0 with selection.rule=easiest",
        ),
        ({"rule": "first", "start_fraction": 0.5}, "selection.start_fraction=0.5 is not allowed: 0.0 with"),
        (
            {"rule": "random", "ramp_fraction": 0.5},
            r"selection.ramp_fraction=0.5 .* \(hardest, all_pairs, predicted do\)",
        ),
        ({"ramp_from": 0.3}, "selection.ramp_from=0.3 is not allowed: 0.5 without a ramp"),
        ({"rule": "all_pairs", "weight_temperature": 0.5}, "selection.weight_temperature=0.5 .*weighting=softmax"),
        ({"rule": "predicted", "reuse_student": True}, "selection.reuse_student=True is not allowed"),
        ({"start_fraction": 0.5, "ramp_fraction": 0.6}, "selection.ramp_fraction=0.6 is not allowed"),
        ({"rule": "easiest", "rescue_share": 0.5}, "selection.rescue_share=0.5 is not allowed: 1.0 with"),
        ({"num_views": 2, "rescue_share": 0.5}, "selection.rescue_share=0.5 .*without 3 or more global views"),
        ({"limit": 3, "rescue_share": 0.5}, "selection.rescue_share=0.5 .*without selection.limit=None"),
        ({"quantile": 0.8, "rescue_share": 0.5}, "selection.rescue_share=0.5 .*without selection.quantile=1.0"),
        ({"ramp_fraction": 0.5, "rescue_share": 0.5}, "selection.rescue_share=0.5 .*without selection.ramp_fraction=0"),
        (
            {"reuse_student": True, "rescue_share": 0.5},
            "selection.rescue_share=0.5 .*without selection.reuse_student=F",
        ),
    ],
)
def test_a_schedule_that_the_rule_does_not_read_is_refused(values: dict[str, Any], refused: str) -> None:
    with pytest.raises(ConfigError, match=refused):
        SelectionConfig(**values)


def test_a_share_that_rescues_no_image_is_refused() -> None:
    """By hand: a tenth of 16 images is 2 of them; of the 4 of an accumulated part, none."""
    tiny_config("o", selection={"rescue_share": 0.1})
    with pytest.raises(
        ConfigError, match="rescue_share=0.1 is not allowed: 0.0, or a share that rescues 1 or more of the 4 images"
    ):
        tiny_config("o", selection={"rescue_share": 0.1}, training={"accumulation_steps": 4})


def test_a_share_that_rescues_one_image_has_no_negatives_in_simclr() -> None:
    for recipe in ("simsiam-digits", "dino-digits"):
        tiny_config("o", recipe, selection={"rescue_share": 0.06})
    with pytest.raises(ConfigError, match="rescue_share=0.06 is not allowed: 0.0, or a share that rescues 2 or more"):
        tiny_config("o", "simclr-digits", selection={"rescue_share": 0.06})


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
        ("training", "initial_run"),
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
