"""The study's rows: what is missing, and the effects that its table and figure show."""

import json
from pathlib import Path

import pytest

from benchmarks import study
from hvp_ray.comparison.arms import get_arm
from hvp_ray.recipes import get_recipe


def _row(arm: str, seed: int, accuracy: float, length: int = 600, setting: str = "simsiam") -> dict[str, object]:
    digest = study.SETTINGS[setting].digest
    row = {"setting": setting, "settings_digest": digest, "length": length, "arm": arm, "seed": seed}
    return row | {"knn_top1": accuracy}


@pytest.mark.parametrize("name", study.SETTINGS)
def test_every_arm_is_a_valid_run_of_its_recipe(name: str) -> None:
    setting = study.SETTINGS[name]
    labels = [get_arm(arm).label for arm in ("vanilla", *setting.arms)]
    assert len(set(labels)) == len(labels), "folders differ"
    for arm in setting.arms:
        get_arm(arm).configure(get_recipe(setting.recipe))


def test_comparisons_with_all_their_rows_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = study.SETTINGS["simsiam"]
    everything = [(length, (seed,)) for length in setting.lengths for seed in setting.seeds]
    assert list(study.missing_comparisons("simsiam", [])) == everything
    done = [_row(arm, 0, 0.5) for arm in ("vanilla", *setting.arms)]
    assert list(study.missing_comparisons("simsiam", done)) == everything[1:]
    assert list(study.missing_comparisons("simsiam", done[:-1])) == everything
    of_other_settings = [row | {"settings_digest": "0"} for row in done]
    assert list(study.missing_comparisons("simsiam", of_other_settings)) == everything
    monkeypatch.setattr(study, "ROWS", tmp_path / "rows.jsonl")
    assert study.read_rows() == []
    study.ROWS.write_text("".join(json.dumps(row) + "\n" for row in done))
    assert study.read_rows() == done


def test_effects_are_paired_differences_in_points() -> None:
    """By hand: differences of 1, 2 and 3 points have mean 2 and t(2) = 4.303 times 1 / sqrt(3)."""
    rows = [_row("vanilla", seed, 0.4 + 0.1 * seed) for seed in range(3)]
    rows += [_row("hardest", seed, 0.4 + 0.1 * seed + 0.01 * (1 + seed)) for seed in range(3)]
    rows += [_row("all-pairs", 0, 0.43)]
    vanilla, hardest, all_pairs = study.effects_of(rows)
    assert (vanilla.mean, vanilla.interval) == (0.0, None)
    assert hardest.mean == pytest.approx(2.0)
    assert hardest.interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert all_pairs.mean == pytest.approx(3.0) and all_pairs.interval is None
    table = study.table_of([vanilla, hardest, all_pairs])
    assert "| simsiam | 600 | `hardest` | 41.0, 52.0, 63.0 | 52.0 | `vanilla` | +2.0 (-0.5 to +4.5) |" in table
    assert len(study.build_figure([vanilla, hardest, all_pairs]).axes) == 1


def test_rows_of_other_settings_are_not_of_today() -> None:
    rows = [_row(arm, seed, 0.5) for arm in ("vanilla", "hardest") for seed in range(2)]
    old = _row("hardest", 0, 0.9) | {"settings_digest": "of an earlier version"}
    assert study.rows_of_today([*rows, old, old | {"setting": "gone"}]) == rows


def test_costs_of_another_setting_are_not_measured_over(tmp_path: Path) -> None:
    assert study.costs_path("simclr-long") == study.costs_path("simclr-confirm")
    with pytest.raises(SystemExit, match="takes its costs from simclr-confirm"):
        study.measure_costs("simclr-long", tmp_path)


def test_seeds_that_are_compared_together_are_repeated_together() -> None:
    setting = study.SETTINGS["simclr-confirm"]
    arms, (first, second, *_) = ("vanilla", *setting.arms), setting.seeds
    done = [_row(arm, seed, 0.5, 1800, "simclr-confirm") for seed in (first, second) for arm in arms]
    everything = list(study.missing_comparisons("simclr-confirm", []))
    assert everything[0] == (1800, (first, second))
    assert list(study.missing_comparisons("simclr-confirm", done)) == everything[1:]
    assert list(study.missing_comparisons("simclr-confirm", done[:-1])) == everything


def test_confirmed_effects_are_also_against_all_pairs() -> None:
    """By hand, in six pairs of seeds: random views have 40 and 42, all pairs 42 and 43, the softmax arm 41 and 45."""
    of_arms = {"vanilla": (0.40, 0.42), "all-pairs": (0.42, 0.43), study.SOFTMAX: (0.41, 0.45)}
    of_arms |= {arm: (0.40, 0.40) for arm in study.CONFIRMED if arm not in of_arms}
    rows = [
        _row(arm, seed, accuracies[seed % 2], 1800, "simclr-confirm")
        for arm, accuracies in of_arms.items()
        for seed in study.SETTINGS["simclr-confirm"].seeds
    ]
    effects = {(effect.arm, effect.against): effect.mean for effect in study.effects_of(rows)}
    assert effects[study.SOFTMAX, "vanilla"] == pytest.approx(2.0)
    assert effects[study.SOFTMAX, "all-pairs"] == pytest.approx(0.5)
    assert len(effects) == len(of_arms) + 1
    assert study.confirmed_settings(study.effects_of(rows)) == {"simclr-confirm": 12}
    assert study.confirmed_settings(study.effects_of(rows[:-1])) == {}, "the last arm lacks a seed"
    assert study.confirmed_settings(study.effects_of(rows[12:])) == {}, "the first arm lacks all"
    figure = study.build_confirmed(study.effects_of(rows))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [*study.LABELS.values()][::-1]
