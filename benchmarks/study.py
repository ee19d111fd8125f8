"""Do hard views pay at equal compute? The runs of a pre-registered study, one comparison per length and seed.

python benchmarks/study.py costs SETTING --data FOLDER      measure once what a step of each arm costs
python benchmarks/study.py run SETTING ... --data FOLDER    do the comparisons that are missing, one after the other
python benchmarks/study.py report                           write results/study.md and two figures from all rows

Run `costs` first: `run` needs its file. FOLDER has cifar10-{train,test}.parquet, and for the setting simclr-imagenette
imagenette128-{train,val}.parquet.

Settings, arms, lengths and seeds are those of docs/experiments/2026-11-29-hard-views-that-pay.md. Stage 2 is in the settings
simclr-confirm, simclr-imagenette and simclr-long. A finished comparison is added to benchmarks/results/study.jsonl, a row for
each run, so that any machine continues where another one stopped.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from matplotlib.figure import Figure

from benchmarks.results_file import describe_machine
from hvp_ray.evaluation.intervals import paired_difference

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "study.jsonl"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
COMPARE = [sys.executable, str(Path(__file__).parents[1] / "pipelines" / "compare.py")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One recipe of the study, and the comparisons made of it."""

    recipe: str
    train: str
    test: str
    lengths: tuple[int, ...]
    """Steps of the arm with random views. Other arms get the same compute."""
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    """Arms beside vanilla."""
    overrides: tuple[str, ...] = ()
    also_against: tuple[tuple[str, str], ...] = ()
    """(arm, another arm): differences beside those of all arms to vanilla."""
    level: float = 0.95
    """Coverage of the intervals."""
    costs_of: str | None = None
    """Setting with the same options, whose measured costs are used. None: this setting's own."""
    title: str | None = None
    """Of its part of the figure of confirmed effects. None: a setting of stage 1."""
    seeds_together: int = 1
    """Seeds of one comparison. An even number of runs keeps two cores busy when each has one thread."""

    @property
    def digest(self) -> str:
        """Digest of the settings that all arms share, so that rows of other settings do not count as done."""
        shared = self.options(Path())
        return hashlib.sha256(" ".join(shared[: shared.index("--arms")]).encode()).hexdigest()[:12]

    def options(self, folder: Path) -> list[str]:
        """Return the options of compare.py that all comparisons share."""
        return [
            self.recipe,
            *("--data.source", str(folder / self.train), "--data.test_source", str(folder / self.test)),
            *COMMON,
            *self.overrides,
            *("--arms", "vanilla", *self.arms),
            *("--budget", "compute", "--views", "inline"),
        ]


COMMON = (
    *("--views.global_views.size_px", "16", "--views.evaluation_resize_px", "16", "--training.images_per_step", "64"),
    *("--training.precision", "bfloat16", "--optimizer.schedule", "cosine-per-step"),
    *("--tracking.uri", "none", "--tracking.knn_images", "10000"),
)
"""Of all settings; a setting's `overrides` come behind it."""
CIFAR10 = {"train": "cifar10-train.parquet", "test": "cifar10-test.parquet"}
LENGTHS = (600, 1800, 5400)
TEN_THOUSAND = ("--data.num_images", "10000")
LATE = "start_fraction=0.5"
ONE_THREAD = ("--training.torch_threads", "1")
SOFTMAX = f"all-pairs:weighting=softmax,{LATE}"
CONFIRMED = ("all-pairs", SOFTMAX, f"hardest:{LATE}", "asym-aug")
"""Arms of stage 2."""
LABELS = dict(
    zip(
        CONFIRMED,
        (
            "all pairs",
            "all pairs, hard ones weigh more\nin the second half",
            "hard views (HVP)\nin the second half",
            "AsymAug",
        ),
        strict=True,
    )
)

SETTINGS = {
    "simclr": Setting(
        recipe="simclr-cifar10-small",
        **CIFAR10,
        lengths=LENGTHS,
        seeds=(0, 1),
        arms=(
            "hardest",
            f"hardest:{LATE}",
            "hardest:start_fraction=0.25,ramp_fraction=0.5",
            "hardest:quantile=0.8",
            "all-pairs",
            f"all-pairs:weighting=softmax,{LATE}",
            f"all-pairs:weighting=matching,{LATE}",
            f"predicted:{LATE}",
            "asym-aug",
        ),
        overrides=TEN_THOUSAND,
    ),
    "simsiam": Setting(
        recipe="simsiam-cifar10-small",
        **CIFAR10,
        lengths=LENGTHS,
        seeds=(0, 1),
        arms=("hardest", f"hardest:{LATE}", "all-pairs", f"all-pairs:weighting=softmax,{LATE}", "fast-siam"),
        overrides=(*TEN_THOUSAND, *ONE_THREAD),
    ),
    "dino": Setting(
        recipe="dino-cifar10-small",
        **CIFAR10,
        lengths=LENGTHS[:2],
        seeds=(0, 1),
        arms=(
            "hardest",
            f"hardest:{LATE}",
            f"hardest:num_global_views=2,{LATE}",
            "vanilla:num_chosen_local_views=8",
        ),
        overrides=(*TEN_THOUSAND, "--views.local_views.size_px", "8"),
    ),
    "simclr-confirm": Setting(
        recipe="simclr-cifar10-small",
        **CIFAR10,
        lengths=(1800,),
        seeds=tuple(range(100, 112)),
        arms=CONFIRMED,
        overrides=(*TEN_THOUSAND, *ONE_THREAD),
        also_against=((SOFTMAX, "all-pairs"),),
        level=0.99,
        title="CIFAR-10, 1,800 steps",
        seeds_together=2,
    ),
    "simclr-imagenette": Setting(
        recipe="simclr-imagenette-small",
        train="imagenette128-train.parquet",
        test="imagenette128-val.parquet",
        lengths=(600,),
        seeds=tuple(range(100, 112)),
        arms=CONFIRMED,
        overrides=(
            *("--views.global_views.size_px", "64", "--views.evaluation_resize_px", "64"),
            *ONE_THREAD,
        ),
        also_against=((SOFTMAX, "all-pairs"),),
        level=0.99,
        title="Imagenette, 600 steps",
        seeds_together=2,
    ),
}
SETTINGS["simclr-long"] = replace(
    SETTINGS["simclr-confirm"],
    lengths=LENGTHS[2:],
    seeds=tuple(range(200, 212)),
    costs_of="simclr-confirm",
    title="CIFAR-10, 5,400 steps",
)


def read_rows() -> list[dict[str, Any]]:
    """Return one value for each run that has been done."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def rows_of_today(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that were made with the settings of today."""
    digests = {(name, setting.digest) for name, setting in SETTINGS.items()}
    return [row for row in rows if (row["setting"], row["settings_digest"]) in digests]


def costs_path(name: str) -> Path:
    """Return the file with what a step of each arm of a setting costs."""
    return RESULTS / f"study-costs-{SETTINGS[name].costs_of or name}.json"


def comparison_of(name: str, length: int, seeds: tuple[int, ...]) -> str:
    """Return the name of a comparison; those of its runs begin with it and a dash."""
    return f"study-{name}-{length}-s{'-'.join(map(str, seeds))}"


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what distinguishes a run of the study."""
    return row["setting"], row["settings_digest"], row["length"], row["seed"], row["arm"]


def missing_comparisons(name: str, rows: list[dict[str, Any]]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the (length, seeds) of a setting whose arms are not all done, short ones first."""
    setting = SETTINGS[name]
    done = {key_of(row) for row in rows}
    for length in setting.lengths:
        for first in range(0, len(setting.seeds), setting.seeds_together):
            seeds = setting.seeds[first : first + setting.seeds_together]
            runs = product(seeds, ("vanilla", *setting.arms))
            if any((name, setting.digest, length, seed, arm) not in done for seed, arm in runs):
                yield length, seeds


def measure_costs(name: str, data: Path) -> None:
    """Measure what a step of each arm costs. Nothing else may run on the machine."""
    if (other := SETTINGS[name].costs_of) is not None:
        raise SystemExit(f"{name} takes its costs from {other}: measure those")
    with tempfile.TemporaryDirectory() as folder:
        words = [*SETTINGS[name].options(data), "--run.output", folder, "--comparison", "costs", "--plan-only"]
        subprocess.run([*COMPARE, *words, "--training.num_steps", "1000", "--seeds", "0"], check=True)
        shutil.copy(Path(folder) / "costs" / "comparison.json", costs_path(name))


def do_comparison(name: str, length: int, seeds: tuple[int, ...], data: Path, output: Path) -> list[dict[str, Any]]:
    """Do one comparison, or continue it; return its rows."""
    comparison = comparison_of(name, length, seeds)
    words = [*SETTINGS[name].options(data), "--run.output", str(output), "--comparison", comparison]
    words += ["--costs", str(costs_path(name)), "--training.num_steps", str(length), "--seeds", *map(str, seeds)]
    subprocess.run([*COMPARE, *words], check=True)
    report = json.loads((output / comparison / "report.json").read_text())
    costs, machine = report["costs"], describe_machine("torch")

    def train_seconds(run: str) -> float:
        summary = json.loads((output / run / "summary.json").read_text())
        return round(summary["train_seconds"], 1)

    recorded = (
        "seed",
        "num_steps",
        "knn_top1",
        "knn5shot_top1",
        "num_collapse_warnings",
        "weights_digest",
    )
    return [
        {"setting": name, "settings_digest": SETTINGS[name].digest, "length": length, "arm": run["arm"]}
        | {key: run[key] for key in recorded}
        | {"train_seconds": train_seconds(run["name"])}
        | {"step_cost": costs[run["arm"]]["step_seconds"] / costs["vanilla"]["step_seconds"]}
        | {key: machine[key] for key in ("date", "cpu", "torch")}
        for run in report["runs"]
    ]


def run(names: list[str], data: Path, output: Path) -> None:
    """Do what is missing, short schedules of all settings first; the rows of a comparison are kept as soon as it is done."""
    missing = [(length, name, seeds) for name in names for length, seeds in missing_comparisons(name, read_rows())]
    for length, name, seeds in sorted(missing, key=lambda comparison: comparison[0]):
        new, rows = do_comparison(name, length, seeds, data, output), read_rows()
        known = {key_of(row) for row in rows}
        rows += [row for row in new if key_of(row) not in known]
        unfinished = ROWS.with_suffix(".part")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
        unfinished.replace(ROWS)
        comparison = comparison_of(name, length, seeds)
        for folder in (output / comparison, *output.glob(f"{comparison}-*")):
            shutil.rmtree(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Difference of two arms at one length, in points of k-NN accuracy."""

    setting: str
    length: int
    arm: str
    against: str
    """The arm that it is compared with."""
    values: list[float]
    """Accuracy of each seed that both have, %."""
    mean: float
    """Mean difference."""
    interval: tuple[float, float] | None
    """Of `Setting.level`, Student's t over paired seeds. None: one seed."""


def effects_of(rows: list[dict[str, Any]]) -> list[Effect]:
    """Return the effects of every arm at every length."""
    accuracy = {(r["setting"], r["length"], r["arm"], r["seed"]): 100 * r["knn_top1"] for r in rows}
    effects = []
    for setting, length, arm in dict.fromkeys(key[:3] for key in accuracy):
        others = [other for ours, other in SETTINGS[setting].also_against if ours == arm]
        for against in ("vanilla", *others):
            of_arm = [key[3] for key in accuracy if key[:3] == (setting, length, arm)]
            seeds = sorted(seed for seed in of_arm if (setting, length, against, seed) in accuracy)
            if not seeds:
                continue
            ours = np.array([accuracy[setting, length, arm, seed] for seed in seeds])
            theirs = np.array([accuracy[setting, length, against, seed] for seed in seeds])
            interval = None
            if len(seeds) > 1 and arm != against:
                found = paired_difference(theirs, ours, level=SETTINGS[setting].level).interval
                interval = (found.low, found.high)
            effects.append(
                Effect(
                    setting=setting,
                    length=length,
                    arm=arm,
                    against=against,
                    values=ours.tolist(),
                    mean=float((ours - theirs).mean()),
                    interval=interval,
                )
            )
    return effects


def table_of(effects: list[Effect]) -> str:
    """Return the effects as a table in Markdown."""
    lines = [
        "| setting | steps | arm | k-NN of each seed, % | mean | against | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for effect in sorted(
        effects, key=lambda e: (e.setting, e.length, e.arm != "vanilla", e.against != "vanilla", -e.mean)
    ):
        is_base = effect.arm == effect.against
        difference = "" if is_base else f"{effect.mean:+.1f}"
        if effect.interval is not None:
            difference += f" ({effect.interval[0]:+.1f} to {effect.interval[1]:+.1f})"
        values = ", ".join(f"{value:.1f}" for value in effect.values)
        against = "" if is_base else f"`{effect.against}`"
        lines.append(
            f"| {effect.setting} | {effect.length} | `{effect.arm}` | {values} "
            f"| {np.mean(effect.values):.1f} | {against} | {difference} |"
        )
    return "\n".join(lines) + "\n"


def build_figure(effects: list[Effect]) -> Figure:
    """Draw the effects of stage 1 against the length of the schedule, one panel for each setting."""
    settings = [name for name in dict.fromkeys(e.setting for e in effects) if SETTINGS[name].title is None]
    figure = Figure(figsize=(5.2 * len(settings), 5.6), layout="constrained")
    for axis, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        arms = dict.fromkeys(e.arm for e in effects if e.setting == setting and e.arm != "vanilla")
        for number, arm in enumerate(arms):
            of_arm = sorted((e for e in effects if (e.setting, e.arm) == (setting, arm)), key=lambda e: e.length)
            lengths = [effect.length * 1.03 ** (number - len(arms) / 2) for effect in of_arm]
            (line,) = axis.plot(lengths, [effect.mean for effect in of_arm], "o-", markersize=4, label=arm)
            for length, effect in zip(lengths, of_arm, strict=True):
                if effect.interval is not None:
                    axis.plot([length, length], effect.interval, color=line.get_color(), linewidth=1, alpha=0.5)
        axis.axhline(0.0, color="#444444", linewidth=1)
        axis.set_xscale("log")
        ticks = sorted({effect.length for effect in effects if effect.setting == setting})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_title(setting, fontsize=10)
        axis.set_xlabel("length of the schedule, random steps of compute")
        axis.set_ylabel("k-NN against random views, points")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0.0, -0.16))
    return figure


def confirmed_settings(effects: list[Effect]) -> dict[str, int]:
    """Return the number of seeds of each setting of stage 2 whose arms all have as many."""
    num_seeds = {(e.setting, e.arm): len(e.values) for e in effects}
    confirmed = {}
    for name in ("simclr-confirm", "simclr-long", "simclr-imagenette"):
        fewest, *others = sorted({num_seeds.get((name, arm), 0) for arm in ("vanilla", *SETTINGS[name].arms)})
        if fewest > 1 and not others:
            confirmed[name] = fewest
    return confirmed


def build_confirmed(effects: list[Effect]) -> Figure:
    """Draw the effects of stage 2 with their intervals, one panel for each of `confirmed_settings`."""
    settings = confirmed_settings(effects)
    figure = Figure(figsize=(4.6 * len(settings) + 1.6, 2.4), layout="constrained")
    axes = figure.subplots(1, len(settings), squeeze=False, sharex=True, sharey=True)[0]
    for axis, (setting, num_seeds) in zip(axes, settings.items(), strict=True):
        of_arms = {e.arm: e for e in effects if e.setting == setting and e.against == "vanilla" != e.arm}
        for place, arm in enumerate(reversed(CONFIRMED)):
            effect = of_arms[arm]
            if effect.interval is not None:
                axis.plot(effect.interval, [place, place], color="tab:blue", linewidth=2)
            axis.plot(effect.mean, place, "o", color="tab:blue")
        axis.set_yticks(range(len(CONFIRMED)), [LABELS[arm] for arm in reversed(CONFIRMED)])
        axis.set_ylim(-0.6, len(CONFIRMED) - 0.4)
        axis.axvline(0.0, color="#444444", linewidth=1)
        axis.grid(axis="x", alpha=0.25)
        axis.set_title(f"{SETTINGS[setting].title}, {num_seeds} seeds", fontsize=10)
        axis.set_xlabel("k-NN against random views at equal compute, points")
    return figure


def report() -> None:
    """Write the table and the figures of all rows, and print the table."""
    rows = rows_of_today(read_rows())
    effects = effects_of(rows)
    hours = sum(row["train_seconds"] for row in rows) / 3600
    text = table_of(effects)
    (RESULTS / "study.md").write_text(text)
    if any(SETTINGS[effect.setting].title is None for effect in effects):
        build_figure(effects).savefig(IMAGES / "study.png", dpi=110)
    if confirmed_settings(effects):
        build_confirmed(effects).savefig(IMAGES / "study_confirmed.png", dpi=130)
    print(text + f"\n{len(rows)} runs, {hours:.1f} hours of training", flush=True)


def main() -> None:
    """Read the command line and do its part of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["costs", "run", "report"])
    parser.add_argument("settings", nargs="*", choices=[*SETTINGS, []], metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the Parquet files")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of the runs in progress")
    options = parser.parse_args()
    match options.part:
        case "costs":
            for name in options.settings:
                measure_costs(name, options.data.absolute())
        case "run":
            run(options.settings, options.data.absolute(), options.output.absolute())
        case "report":
            report()


if __name__ == "__main__":
    main()
