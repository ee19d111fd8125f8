"""Arms of a comparison. An arm changes how views are chosen. Some also change images per step, augmentation or loss.

Arms of a seed share images, order, initial weights, and the crops of views that both render. Arms that train on every
view that they render take fewer images per step, so that all arms train on equally many views per step.
"""

import ast
import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvp_ray.config import RunConfig, SelectionConfig
from hvp_ray.errors import ConfigError
from hvp_ray.methods.configs import SimSiamConfig

_SELECTION_FIELDS = [field.name for field in dataclasses.fields(SelectionConfig) if field.name != "rule"]

VANILLA = "vanilla"
VANILLA_LONG = "vanilla-long"
HARDEST = "hardest"


_METHOD_EPOCHS = ("freeze_last_layer_epochs", "warmup_teacher_epochs", "warmup_patch_teacher_epochs")
"""Settings of methods that are counted in epochs."""


def _unchanged(config: RunConfig) -> RunConfig:
    return config


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way of choosing views."""

    name: str
    title: str
    """Description in tables and figures."""
    selection: Mapping[str, Any]
    """Fields of `SelectionConfig` that the arm sets."""
    change: Callable[[RunConfig], RunConfig] = _unchanged
    """What else the arm changes."""
    is_control: bool = False

    @property
    def priced_as(self) -> str:
        """Arm whose steps cost as much as the steps of this one."""
        return VANILLA if self.name == VANILLA_LONG else self.name

    @property
    def label(self) -> str:
        """Name of the arm in the names of folders."""
        return "".join(character if character.isalnum() or character in "._-" else "-" for character in self.name)

    def configure(self, config: RunConfig) -> RunConfig:
        """Return the run of this arm.

        Raises:
            ConfigError: the recipe does not allow it.
        """
        try:
            return self.change(dataclasses.replace(config, selection=config.selection.with_rule(**self.selection)))
        except ConfigError as error:
            raise ConfigError(f"arm {self.name}: {error}") from error


def with_equal_views_per_step(config: RunConfig) -> RunConfig:
    """Return the run of an arm that trains on all V views: 2 / V of the images per step, at the same learning rate.

    It renders V / 2 times the local views that a random step trains on. Warm-ups are counted in epochs, which have V / 2
    times the steps, so they are shortened by this factor; those in whole epochs are rounded up.

    Raises:
        ConfigError: this is no whole number of images, or of local views.
    """
    selection, images = config.selection, config.training.images_per_step
    views, chosen_locals = selection.num_candidate_views, selection.num_chosen_local_views
    if 2 * images % views:
        raise ConfigError(
            f"training.images_per_step={images} is not allowed: with {views} views a step has 2/{views} of the images, which "
            f"must be a whole number"
        )
    if chosen_locals is not None:
        if chosen_locals * views % 2:
            raise ConfigError(
                f"selection.num_chosen_local_views={chosen_locals} is not allowed: {views} global views need {views}/2 times "
                f"as many, which must be a whole number"
            )
        selection = dataclasses.replace(selection, num_local_views=chosen_locals * views // 2)
    optimizer, method = config.optimizer, config.method
    epochs = {name: getattr(method, name) for name in _METHOD_EPOCHS if hasattr(method, name)}
    return dataclasses.replace(
        config,
        selection=selection,
        training=dataclasses.replace(config.training, images_per_step=2 * images // views),
        method=dataclasses.replace(method, **{name: math.ceil(count * 2 / views) for name, count in epochs.items()}),
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate_per_256=optimizer.learning_rate_per_256 * views / 2,
            warmup_epochs=optimizer.warmup_epochs * 2 / views,
        ),
    )


def with_averaged_target(config: RunConfig) -> RunConfig:
    """Return FastSiam (Pototzky et al., GCPR 2022): every view predicts the mean of the other views' targets."""
    if not isinstance(config.method, SimSiamConfig):
        raise ConfigError(f"FastSiam is a form of SimSiam, and the recipe's method is {config.method.name}")
    return with_equal_views_per_step(
        dataclasses.replace(config, method=dataclasses.replace(config.method, averaged_target=True))
    )


def with_weak_odd_views(config: RunConfig) -> RunConfig:
    """Return a run whose second view is drawn weakly, after AsymAug (Wang et al., CVPR 2022): crop and flip only."""
    group = config.views.global_views
    weak = dataclasses.replace(
        group.even,
        jitter_probability=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
        solarize_probability=0.0,
    )
    views = dataclasses.replace(config.views, global_views=dataclasses.replace(group, odd=weak))
    return dataclasses.replace(config, views=views)


_NEUTRAL = {
    "every": 1,
    "start_fraction": 0.0,
    "ramp_fraction": 0.0,
    "ramp_from": 0.5,
    "quantile": 1.0,
    "limit": None,
    "score_always": False,
    "scoring_resolution_px": None,
}
"""Neutral values of what a recipe sets for hard views."""
_RANDOM_VIEWS = _NEUTRAL | {"rule": "first"}
_ALL_PAIRS = _NEUTRAL | {
    "rule": "all_pairs",
    "weighting": "mean",
    "weight_temperature": 1.0,
    "weight_top_k": None,
}
_PREDICTED = _NEUTRAL | {"rule": "predicted"}


def _control(name: str, title: str, **selection: Any) -> Arm:
    return Arm(name=name, title=f"control: {title}", selection=_NEUTRAL | selection, is_control=True)


ARMS = {
    arm.name: arm
    for arm in (
        Arm(name=VANILLA, title="random views", selection=_RANDOM_VIEWS),
        Arm(name=HARDEST, title="hard views (HVP)", selection={"rule": "hardest"}),
        Arm(name=VANILLA_LONG, title="random views, trained longer (equal compute)", selection=_RANDOM_VIEWS),
        Arm(
            name="all-pairs",
            title="all pairs of all rendered views, fewer images per step",
            selection=_ALL_PAIRS,
            change=with_equal_views_per_step,
        ),
        Arm(
            name="fast-siam",
            title="FastSiam: all views against the mean of the others, fewer images per step",
            selection=_ALL_PAIRS,
            change=with_averaged_target,
        ),
        Arm(name="predicted", title="pairs predicted to be hard, before rendering", selection=_PREDICTED),
        Arm(
            name="asym-aug",
            title="AsymAug: random views, the second one only cropped and flipped",
            selection=_RANDOM_VIEWS,
            change=with_weak_odd_views,
        ),
        _control("random", "a random pair of the rendered views", rule="random"),
        _control("easiest", "the easiest pair", rule="easiest"),
        _control("min-iou", "the pair of least overlap (no model)", rule="min_iou"),
        _control(
            "batch-norm",
            "random pair; the other views are seen by BatchNorm only",
            rule="random",
            score_always=True,
            scoring_batch_norm="faithful",
        ),
    )
}


def get_arm(name: str) -> Arm:
    """Return the arm of this name. `hardest:every=3` and `all-pairs:weighting=softmax,start_fraction=0.5` set fields.

    Raises:
        ConfigError: the name is unknown. The message suggests the nearest one.
    """
    known, _, settings = name.partition(":")
    if known not in ARMS:
        near = difflib.get_close_matches(known, ARMS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown arm {name!r}; did you mean {near!r}? There are: {', '.join(ARMS)}; any of them may set fields of "
            f"selection, as hardest:every=3"
        )
    if not settings:
        return ARMS[known]
    if known == VANILLA_LONG:
        raise ConfigError(f"arm {name}: {VANILLA_LONG} takes no settings, because it is {VANILLA} with more steps")
    fields = dict(_parse_setting(name, setting) for setting in settings.split(","))
    arm = ARMS[known]
    return dataclasses.replace(arm, name=name, title=f"{arm.title}; {settings}", selection={**arm.selection, **fields})


def run_of_arm(name: str, config: RunConfig) -> RunConfig:
    """Return the run of an arm by itself, outside of a comparison.

    Raises:
        ConfigError: the name is unknown, or the recipe does not allow the arm.
    """
    if name == VANILLA_LONG:
        raise ConfigError(
            f"arm {name} is not allowed: its number of steps comes from a comparison; use {VANILLA} and set training.epochs"
        )
    return get_arm(name).configure(config)


def refusal_for_existing_run(arm: str, run_name: str | None) -> ConfigError:
    """Return the error for an arm that would change the settings of an existing run, which may be an arm's already."""
    return ConfigError(
        f"arm {arm} is not allowed: the run {run_name} exists and keeps its settings, its arm included; leave the arm out"
    )


def _parse_setting(arm: str, setting: str) -> tuple[str, Any]:
    field, _, text = setting.partition("=")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if field not in _SELECTION_FIELDS:
        near = difflib.get_close_matches(field, _SELECTION_FIELDS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"arm {arm}: {field!r} is no setting of an arm; did you mean {near!r}?")
    return field, value


def hard_arm_of(arms: Sequence[Arm]) -> Arm:
    """Return the arm whose compute `vanilla-long` gets: `hardest`, else the first arm with hard views.

    Raises:
        ConfigError: no arm has hard views.
    """
    hard = [arm for arm in arms if arm.selection["rule"] == "hardest"]
    if not hard:
        raise ConfigError(f"the arm {VANILLA_LONG} needs an arm with hard views beside it: add {HARDEST}")
    return next((arm for arm in hard if arm.name == HARDEST), hard[0])
