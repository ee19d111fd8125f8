"""The study's rows: what is missing, and the effects that its table and figure show."""

import json
from pathlib import Path

import pytest

from benchmarks import study
from hvp_ray.comparison.arms import get_arm
from hvp_ray.recipes import get_recipe


def _row(arm: str, seed: int, accuracy: float, length: int = 600) -> dict[str, object]:
    digest = study.SETTINGS["simsiam"].digest
    row = {"setting": "simsiam", "settings_digest": digest, "length": length, "arm": arm, "seed": seed}
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
    everything = [(length, seed) for length in setting.lengths for seed in setting.seeds]
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
    assert "| simsiam | 600 | `hardest` | 41.0, 52.0, 63.0 | 52.0 | +2.0 (-0.5 to +4.5) |" in table
    assert len(study.build_figure([vanilla, hardest, all_pairs]).axes) == 1
