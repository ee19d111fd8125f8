"""A comparison on disk grows by arms and seeds only, and measures its costs once."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvp_ray.comparison import runner
from hvp_ray.comparison.arms import get_arm
from hvp_ray.comparison.results import (
    Difference,
    describe_difference,
    describe_result,
    describe_shortfall,
    read_run,
    summarize_metric,
)
from hvp_ray.comparison.results import RunResult as Result
from hvp_ray.comparison.runner import is_done, num_parallel
from hvp_ray.comparison.step_cost import StepCost, measure_step_costs
from hvp_ray.comparison.study import Study, check_labels, open_study, read_costs
from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import ConfigError, DataError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.launch.placement import ClusterState
from hvp_ray.stream.machine import PROCESS_BYTES, Machine
from hvp_ray.training.schedules import base_learning_rate
from tests.helpers import encode, tiny_config

import torch  # isort: skip


def _cost(seconds: float, operations: float = 10.0) -> StepCost:
    return StepCost(
        step_seconds=seconds,
        render_cpu_seconds=0.5,
        views_per_image=2.0,
        forwards_per_image=2.0,
        counted_operations=operations,
        memory_bytes=1.0,
    )


class _Stopwatch:
    """Simulates a machine: `speed` seconds for a random step, 1.5 times that for a hard step."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self.asked: list[list[str]] = []

    def __call__(self, arms: list[str]) -> dict[str, StepCost]:
        self.asked.append(arms)
        hard = {"hardest": 1.5, "hardest:every=2": 1.25, "hardest:start_fraction=0.5": 1.25}
        return {arm: _cost(self.speed * hard.get(arm, 1.0), 10.0 * (1.0 + (arm == "hardest") * 0.67)) for arm in arms}


def _open(base: RunConfig, machine: _Stopwatch, *arms: str, seeds: tuple[int, ...] = (0, 1), **options: Any) -> Study:
    return open_study(
        base,
        open_dataset(base.data),
        name="study",
        arm_names=arms or ("vanilla", "hardest", "vanilla-long"),
        seeds=seeds,
        budget=options.get("budget", "steps"),
        accounting=options.get("accounting", "measured"),
        measure=machine,
    )


def test_costs_are_measured_once_and_new_arms_are_scaled_to_them(tmp_path: Path) -> None:
    base = tiny_config(str(tmp_path))
    first, slower = _Stopwatch(1.0), _Stopwatch(3.0)
    study = _open(base, first)
    assert first.asked == [["vanilla", "hardest"]]
    assert study.compute_ratio == 1.5
    grown = _open(base, slower, "vanilla", "hardest", "vanilla-long", "hardest:every=2", seeds=(0, 1, 2))
    assert slower.asked == [["vanilla", "hardest:every=2"]]
    assert grown.compute_ratio == 1.5 and grown.ratio_of(get_arm("hardest:every=2")) == pytest.approx(1.25)
    assert len(grown.runs()) == 12
    _open(base, slower)
    assert len(slower.asked) == 1


def _by_step(tmp_path: Path) -> RunConfig:
    return tiny_config(str(tmp_path), optimizer={"schedule": "cosine-per-step"})


def test_equal_compute_is_steps_times_cost(tmp_path: Path) -> None:
    """By hand: 20 random steps at 1.0; hard steps cost 1.5, so 13; one hard step in two costs 1.25, so 16."""
    arms = ("vanilla", "hardest", "hardest:every=2")
    study = _open(_by_step(tmp_path), _Stopwatch(1.0), *arms, seeds=(0,), budget="compute")
    assert [run.num_steps for run in study.runs()] == [20, 13, 16]
    assert [run.config.training.num_steps for run in study.runs()] == [None, 13, 16]
    metric = summarize_metric(study, [_result(study, arm, 0, 0.5) for arm in arms], "knn_top1")
    assert {difference.question.rpartition(", ")[2] for difference in metric.differences} == {"equal compute"}
    with pytest.raises(ConfigError, match="leave out vanilla-long"):
        _open(_by_step(tmp_path), _Stopwatch(1.0), budget="compute")


def test_compute_grows_by_the_steps_that_were_done(tmp_path: Path) -> None:
    """By hand: 16 steps at 1.25 on average, the first 8 on random views at 1.0, so the others cost 1.5."""
    arms = ("vanilla", "hardest:every=2", "hardest:start_fraction=0.5")
    study = _open(_by_step(tmp_path), _Stopwatch(1.0), *arms, seeds=(0,), budget="compute")
    vanilla, every, late = study.runs()
    assert [study.compute_until(vanilla, step) for step in (0, 10, 20)] == [0, 10, 20]
    assert [study.compute_until(every, step) for step in (0, 8, 16)] == [0, 10, 20]
    assert [study.compute_until(late, step) for step in (0, 8, 12, 16)] == [0, 8, 14, 20]


def test_arms_that_train_on_all_views_take_fewer_images_in_as_many_steps(tmp_path: Path) -> None:
    base = _by_step(tmp_path)
    vanilla, everything = _open(base, _Stopwatch(1.0), "vanilla", "all-pairs", seeds=(0,)).runs()
    images = [run.config.training.images_per_step for run in (vanilla, everything)]
    assert images == [base.training.images_per_step, base.training.images_per_step // 2]
    assert vanilla.num_steps == everything.num_steps == 20
    rates = [base_learning_rate(run.config.optimizer, images[i]) for i, run in enumerate((vanilla, everything))]
    assert rates[0] == pytest.approx(rates[1])


def test_costs_of_another_comparison_are_read(tmp_path: Path) -> None:
    study = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0))
    path = Path(study.location) / "comparison.json"
    longer = tiny_config(str(tmp_path), training={"epochs": 7}, data={"num_images": 100})
    assert read_costs(str(path), longer) == study.costs, "a step costs as much in a longer run and on fewer images"
    larger = tiny_config(str(tmp_path), training={"images_per_step": 32})
    with pytest.raises(ConfigError, match=r"(?s)costs of other steps.*training.images_per_step: 16 -> 32"):
        read_costs(str(path), larger)
    kept = tiny_config(str(tmp_path), training={"activation_checkpointing": True})
    with pytest.raises(ConfigError, match=r"(?s)costs of other steps.*activation_checkpointing: False -> True"):
        read_costs(str(path), kept)
    with pytest.raises(ConfigError, match="is no comparison.json"):
        read_costs(str(tmp_path / "nothing.json"), study.base)


def test_arms_whose_schedules_would_end_elsewhere_are_refused(tmp_path: Path) -> None:
    by_epoch = tiny_config(str(tmp_path), optimizer={"schedule": "cosine-per-epoch"})
    for arms, budget in ((("vanilla", "hardest"), "compute"), (("vanilla", "all-pairs"), "steps")):
        with pytest.raises(ConfigError, match="give --optimizer.schedule cosine-per-step"):
            _open(by_epoch, _Stopwatch(1.0), *arms, budget=budget)
    _open(by_epoch, _Stopwatch(1.0), "vanilla", "hardest")


def test_counted_accounting_uses_operations(tmp_path: Path) -> None:
    study = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0), accounting="counted")
    assert study.compute_ratio == pytest.approx(1.67)


def test_other_settings_under_the_same_name_are_refused_with_the_difference(tmp_path: Path) -> None:
    _open(tiny_config(str(tmp_path)), _Stopwatch(1.0))
    with pytest.raises(ConfigError, match=r"training.epochs: 2 -> 3"):
        _open(tiny_config(str(tmp_path), training={"epochs": 3}), _Stopwatch(1.0))
    elsewhere = tiny_config(str(tmp_path), data={"block_cache_mib": 7}, cluster={"num_view_workers": 2})
    _open(elsewhere, _Stopwatch(1.0))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("tracking", {"knn_neighbours": 1, "knn_images": 30}, r"(?s)knn_images: 40 -> 30.*knn_neighbours: 20 -> 1"),
        ("data", {"test_fraction": 0.3}, r"(?s)training images: .*data.test_fraction: 0.2 -> 0.3"),
        ("cluster", {"device": "cuda"}, r"device: 'cpu' -> 'cuda'"),
        ("views", {"evaluation_resize_px": 40}, r"views.evaluation_resize_px: 8 -> 40"),
    ],
)
def test_two_protocols_in_one_comparison_are_refused(
    tmp_path: Path, section: str, values: dict[str, object], message: str
) -> None:
    _open(tiny_config(str(tmp_path)), _Stopwatch(1.0))
    with pytest.raises(ConfigError, match=message):
        _open(tiny_config(str(tmp_path), **{section: values}), _Stopwatch(1.0), seeds=(0, 1, 2))


def test_comparison_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    study = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0))
    path = Path(study.location) / "comparison.json"
    path.write_text(json.dumps({"settings": {"training.epochs": 2}, "costs": json.loads(path.read_text())["costs"]}))
    with pytest.raises(ConfigError, match="earlier version of hvp_ray.*--comparison NAME"):
        _open(tiny_config(str(tmp_path)), _Stopwatch(1.0))


def test_an_arm_that_changes_equal_compute_plans_another_long_run(tmp_path: Path) -> None:
    """With `hardest:every=2` the long run has 1.25 times the steps; `hardest`, added later, makes it 1.5 times."""
    base = tiny_config(str(tmp_path), training={"num_steps": 2})
    before = _open(base, _Stopwatch(1.0), "vanilla", "hardest:every=2", "vanilla-long", seeds=(0,))
    for run in before.runs():
        pretrain_in_process(run.config)
    assert all(is_done(run) for run in before.runs())
    after = _open(base, _Stopwatch(1.0), "vanilla", "hardest:every=2", "hardest", "vanilla-long", seeds=(0,))
    assert before.compute_ratio == 1.25 and after.compute_ratio == 1.5
    assert {run.arm.name: run.num_steps for run in after.runs()}["vanilla-long"] == 3
    assert {run.arm.name for run in after.runs() if is_done(run)} == {"vanilla", "hardest:every=2"}


def test_a_run_is_not_reused_by_its_name_alone(tmp_path: Path) -> None:
    base = tiny_config(str(tmp_path), training={"num_steps": 2})
    study = _open(base, _Stopwatch(1.0), "vanilla", "hardest", seeds=(0,))
    vanilla, hardest = study.runs()
    pretrain_in_process(vanilla.config)
    assert is_done(vanilla) and not is_done(hardest)
    assert read_run(study, vanilla).summary["num_steps"] == 2
    path = tmp_path / vanilla.name / "summary.json"
    finished = path.read_text()
    path.write_text(json.dumps(json.loads(finished) | {"knn5shot_top1": None, "problems": ["k-NN failed"]}))
    assert not is_done(vanilla), "its evaluation is repeated"
    path.write_text(finished)
    other = tiny_config(str(tmp_path), training={"num_steps": 2}, optimizer={"learning_rate_per_256": 0.01})
    with pytest.raises(ConfigError, match=r"comparison .* other settings.*\n.*learning_rate_per_256: .* -> 0.01"):
        _open(other, _Stopwatch(1.0), "vanilla", "hardest", seeds=(0,))
    shutil.rmtree(study.location)
    with pytest.raises(ConfigError, match=r"study-vanilla-s0 holds another run.*\n.*learning_rate_per_256: .* -> 0.01"):
        _open(other, _Stopwatch(1.0), "vanilla", "hardest", seeds=(0,))
    assert not Path(study.location).exists(), "a refused comparison writes nothing"
    planned = dataclasses.replace(study, base=other).runs()[0]
    assert not is_done(planned)
    with pytest.raises(DataError, match="does not hold the finished run"):
        read_run(dataclasses.replace(study, base=other), planned)
    _open(base, _Stopwatch(1.0), "vanilla", "hardest", seeds=(0,))


@pytest.mark.parametrize(
    ("arms", "seeds", "message"),
    [
        (("hardest",), (0,), "vanilla is missing"),
        (("vanilla", "hardest", "hardest"), (0,), "only once"),
        (("vanilla", "hardest"), (0, 0), "only once"),
        (("vanilla", "vanilla-long"), (0,), "needs an arm with hard views"),
    ],
)
def test_wrong_arms_and_seeds_are_refused(
    tmp_path: Path, arms: tuple[str, ...], seeds: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _open(tiny_config(str(tmp_path)), _Stopwatch(1.0), *arms, seeds=seeds)


def test_measured_cost_of_a_hard_step_is_between_one_and_the_counted_ratio(tmp_path: Path) -> None:
    """Real steps on real digits; bounds are wide, because two cores are shared: a hard step costs more than a random one.

    One elastic trainer's largest share is measured, without compilation.
    """
    base = tiny_config(
        str(tmp_path),
        training={"images_per_step": 24, "compile": True, "cuda_graphs": True},
        cluster={"num_trainers": 3, "min_trainers": 2},
    )
    arms = [
        get_arm(name) for name in ("vanilla", "hardest", "hardest:every=2", "all-pairs", "hardest:rescue_share=0.5")
    ]
    costs = measure_step_costs(
        base, arms, open_dataset(base.data), device=torch.device("cpu"), repeats=5, at_least_seconds=4.0
    )
    vanilla, hardest, every, everything, rescue = (costs[arm.name] for arm in arms)
    assert 1.0 < hardest.step_seconds / vanilla.step_seconds < 3.0
    assert hardest.counted_operations / vanilla.counted_operations == pytest.approx(5 / 3, rel=0.05)
    assert every.counted_operations == pytest.approx((hardest.counted_operations + vanilla.counted_operations) / 2)
    assert everything.counted_operations == pytest.approx(vanilla.counted_operations)
    # Scoring forwards 3 views of each image in the mean, and training 2 with gradient.
    assert rescue.counted_operations / vanilla.counted_operations == pytest.approx(1 + 3 / 6, rel=0.02)
    assert [costs[arm.name].views_per_image for arm in arms] == [2.0, 4.0, 3.0, 4.0, 4.0]
    assert [costs[arm.name].forwards_per_image for arm in arms] == [2.0, 6.0, 4.0, 4.0, 5.0]


@pytest.mark.parametrize("recipe", ["simsiam-digits", "dino-digits"])
def test_steps_of_equal_work_cost_exactly_the_same(tmp_path: Path, recipe: str) -> None:
    base = tiny_config(str(tmp_path), recipe)
    hard = ("hardest", "hardest:quantile=0.8", "hardest:ramp_fraction=0.2")
    names = ("vanilla", "vanilla:score_always=False", "asym-aug", *hard, "hardest:start_fraction=0.5", "easiest")
    costs = measure_step_costs(
        base,
        [get_arm(name) for name in names],
        open_dataset(base.data),
        device=torch.device("cpu"),
        repeats=1,
        at_least_seconds=0.0,
    )
    seconds = {name: cost.step_seconds for name, cost in costs.items()}
    assert seconds["vanilla"] == seconds["vanilla:score_always=False"] == seconds["asym-aug"]
    assert len({seconds[name] for name in hard}) == 1
    half = (seconds["vanilla"] + seconds["hardest"]) / 2
    assert seconds["hardest:start_fraction=0.5"] == pytest.approx(half, rel=1e-9)
    assert len({seconds["vanilla"], seconds["hardest"], seconds["easiest"]}) == 3, "other work is measured by itself"


def _result(study: Study, arm: str, seed: int, value: float) -> Result:
    folder = Path(study.location)
    summary = {"knn_top1": value}
    return Result(arm=arm, seed=seed, name=arm, location=str(folder), folder=folder, summary=summary, curve=())


def _compared(tmp_path: Path, gains: list[float]) -> tuple[Study, Difference]:
    seeds = tuple(range(len(gains)))
    study = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0), seeds=seeds)
    results = []
    for seed, gain in zip(seeds, gains, strict=True):
        base = 0.5 + 0.1 * seed  # seeds differ by far more than arms: only pairing shows the gain
        results += [
            _result(study, "vanilla", seed, base),
            _result(study, "hardest", seed, base + gain),
            _result(study, "vanilla-long", seed, base + 0.02),
        ]
    metric = summarize_metric(study, results, "knn_top1")
    sentence = describe_result(study, metric)
    assert "equal steps" in sentence and "equal compute" in sentence
    assert [d.reference for d in metric.differences] == ["vanilla", "vanilla-long"]
    return study, metric.differences[0]


def test_a_small_gain_that_all_seeds_share_is_shown_by_pairing(tmp_path: Path) -> None:
    """By hand: mean 0.010, standard deviation 0.001, t(2) = 4.303, so +-0.00248."""
    _, difference = _compared(tmp_path, [0.009, 0.010, 0.011])
    assert difference.test is not None
    assert difference.mean == pytest.approx(0.010)
    assert difference.test.interval.low == pytest.approx(0.010 - 4.3027 * 0.001 / 3**0.5, abs=1e-6)
    assert difference.verdict == "better"
    assert "+1.0 points (95% interval +0.8 to +1.2)" in describe_difference(difference)


def test_no_claim_is_made_if_chance_explains_the_difference(tmp_path: Path) -> None:
    study, difference = _compared(tmp_path, [0.03, -0.01, 0.01])
    assert difference.verdict == "no difference shown"
    one = dataclasses.replace(difference, test=None)
    assert one.verdict == "not known" and "no interval" in describe_difference(one)
    _, equal = _compared(tmp_path / "equal", [0.0025] * 4)  # one test image of 400 on every seed
    assert equal.verdict == "not known"
    assert describe_difference(equal) == "+0.2 points (equal on all 4 seeds: no interval)"
    assert json.loads((Path(study.location) / "comparison.json").read_text())["costs"]["hardest"]["step_seconds"] == 1.5


def test_no_claim_is_made_if_chance_explains_the_largest_of_several_differences(tmp_path: Path) -> None:
    """By hand: t(2) is 5.46 and -3.77, so p is 0.032 and 0.064; of two, the smaller p counts twice."""
    study, difference = _compared(tmp_path, [0.008, 0.012, 0.0155])
    assert difference.test is not None
    assert difference.test.interval.low > 0.0 and difference.test.p_value == pytest.approx(0.032, abs=5e-4)
    assert difference.adjusted_p_value == pytest.approx(0.064, abs=5e-4)
    assert difference.verdict == "no difference shown"
    results = [_result(study, "vanilla", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    results += [_result(study, "hardest", seed, 0.5 + 0.1 * seed + g) for seed, g in enumerate((0.008, 0.012, 0.0155))]
    alone = dataclasses.replace(study, arms=tuple(arm for arm in study.arms if arm.name != "vanilla-long"))
    metric = summarize_metric(alone, results, "knn_top1")
    assert metric.differences[0].verdict == "better"
    results += [_result(study, "vanilla-long", seed, 0.52 + 0.1 * seed) for seed in range(3)]
    text = describe_result(study, summarize_metric(study, results, "knn_top1"))
    assert "+0.3 to +2.1), which is within chance among 2 differences" in text


def test_the_sentence_names_the_arm_whose_compute_is_equalled(tmp_path: Path) -> None:
    arms = ("vanilla", "hardest:every=2", "vanilla-long")
    study = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0), *arms, seeds=(0,))
    metric = summarize_metric(study, [_result(study, arm, 0, 0.5) for arm in arms], "knn_top1")
    assert "at equal compute hardest:every=2 gave +0.0 points" in describe_result(study, metric)
    study = dataclasses.replace(study, arms=(*study.arms, get_arm("hardest")))
    metric = summarize_metric(study, [_result(study, arm.name, 0, 0.5) for arm in study.arms], "knn_top1")
    pairs = [(difference.arm, difference.reference) for difference in metric.differences]
    assert pairs == [("hardest:every=2", "vanilla"), ("hardest", "vanilla"), ("hardest", "vanilla-long")]


def test_report_warns_when_no_arm_is_better_than_what_learned_nothing(tmp_path: Path) -> None:
    study = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0), seeds=(0,))

    def warning(best: float) -> str | None:
        results = [_result(study, arm.name, 0, best if arm.name == "hardest" else 0.2) for arm in study.arms]
        results[0].summary.update(knn_top1_untrained=0.3, knn_top1_pixels=0.5)
        return describe_shortfall(summarize_metric(study, results, "knn_top1"))

    assert warning(0.51) is None
    pixels, both = warning(0.4) or "", warning(0.3) or ""
    assert "untrained encoder" not in pixels and "(50.0 %); the best has 40.0 %" in pixels
    assert "untrained encoder (30.0 %) or " in both and "(50.0 %); the best has 30.0 %" in both


def test_unknown_metric_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    study = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0))
    with pytest.raises(ConfigError, match="there are: knn_top1"):
        summarize_metric(study, [_result(study, "vanilla", 0, 0.5)], "accuracy")


def test_downscaled_pixels_are_named_by_their_size(tmp_path: Path) -> None:
    study = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0), seeds=(0,))
    results = [_result(study, arm.name, 0, 0.5) for arm in study.arms]
    results[0].summary["knn_top1_pixels"] = 0.25
    assert summarize_metric(study, results, "knn_top1").references == {"raw pixels": 0.25}
    views = dataclasses.replace(
        study.base.views,
        global_views=dataclasses.replace(study.base.views.global_views, size_px=64),
        evaluation_resize_px=64,
    )
    large = dataclasses.replace(study, base=dataclasses.replace(study.base, views=views))
    assert summarize_metric(large, results, "knn_top1").references == {"raw pixels (32 px)": 0.25}


def test_run_whose_evaluation_failed_is_an_error_that_says_how_to_repeat_it(tmp_path: Path) -> None:
    study = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0))
    failed = dataclasses.replace(
        _result(study, "vanilla", 0, 0.5), summary={"knn_top1": None, "problems": ["k-NN failed: out of memory"]}
    )
    with pytest.raises(DataError, match=r"without knn_top1: k-NN failed: out of memory\. .*start the comparison again"):
        summarize_metric(study, [_result(study, "vanilla", 1, 0.5), failed], "knn_top1")


def test_comparison_whose_arms_cannot_be_judged_is_refused_before_it_starts(tmp_path: Path) -> None:
    def check(**sections: dict[str, object]) -> tuple[str, ...]:
        base = tiny_config(str(tmp_path), **sections)
        return check_labels(base, open_dataset(base.data))

    assert check() == ()
    with pytest.raises(ConfigError, match="but tracking.knn_images=0"):
        check(tracking={"knn_images": 0})
    with pytest.raises(ConfigError, match="judged by k-NN on labelled images, but there are no test images"):
        check(data={"test_fraction": 0.0})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(encode(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(ConfigError, match="but .*/images has no labels"):
        check(data={"test_source": str(tmp_path / "images")})


def test_inline_runs_of_a_local_ray_are_as_many_as_the_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _open(tiny_config(str(tmp_path)), _Stopwatch(1.0), seeds=(0, 1, 2)).runs()
    small = Machine(num_cpus=16, memory_bytes=2**33, free_bytes=4 * PROCESS_BYTES, shared_memory_bytes=2**33)
    monkeypatch.setattr(runner, "this_machine", lambda: small)
    state = ClusterState(total={}, free={}, nodes=[{"CPU": 16.0}])
    monkeypatch.setattr(runner, "read_cluster", lambda: state)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    dataset = open_dataset(runs[0].config.data)
    assert num_parallel(runs, dataset, "inline", wanted=None) == 2
    with pytest.raises(ConfigError, match="--parallel 3 is not allowed: 2 "):
        num_parallel(runs, dataset, "inline", wanted=3)
    monkeypatch.setattr(runner, "this_machine", lambda: dataclasses.replace(small, free_bytes=0))
    assert num_parallel(runs, dataset, "inline", wanted=None) == 1
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # the nodes' memory is not this machine's
    assert num_parallel(runs, dataset, "inline", wanted=None) == 9


def test_inline_runs_on_gpus_have_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _open(tiny_config(str(tmp_path), cluster={"device": "cuda"}), _Stopwatch(1.0), seeds=(0, 1, 2)).runs()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    dataset = open_dataset(runs[0].config.data)
    nodes = [{"CPU": 16.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 8.0}]
    monkeypatch.setattr(runner, "read_cluster", lambda: ClusterState(total={}, free={}, nodes=nodes))
    assert num_parallel(runs, dataset, "inline", wanted=None) == 3
    monkeypatch.setattr(runner, "read_cluster", lambda: ClusterState(total={}, free={}, nodes=nodes[:1]))
    with pytest.raises(
        ConfigError, match="cluster.device=cuda needs a node with a GPU and training.torch_threads=1 CPUs"
    ):
        num_parallel(runs, dataset, "inline", wanted=None)
