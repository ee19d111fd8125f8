"""Faults and memory for long: many random kills in one run, and the memory of every process over many steps.

python benchmarks/soak.py [--kills N] [--steps N] [--output FOLDER] [--name NAME]

kills: in one run with four view workers, N times one of them dies (SIGKILL) at a random moment, and for every 50 of these the
trainer once. The weights must be those of an undisturbed run, every step must be journalled once, no image quarantined.
steps: one small run of N steps, with MLflow, batches through the object store. The memory (RSS) of view worker, trainer,
raylet and GCS is sampled; from a fifth of the steps on (2,000 of 10,000) the least-squares line through it must rise by less
than 1 MB per 1,000 steps, and nothing may be spilled.

FOLDER gets NAME.jsonl (the figures), NAME.csv (the memory, thinned out), NAME.png. 0 leaves a part out. The last line that
is printed has the figures; the exit status is 1 if a bound is broken. Runs lie below TMPDIR and are deleted.
"""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

from hvp_ray.launch.environment import prepare_ray_environment

prepare_ray_environment()

import numpy as np
import psutil

from benchmarks.results_file import describe_machine, open_results
from benchmarks.soaking.growth import Sample, draw, growth_mb_per_1000_steps, thin_out, write_csv
from benchmarks.soaking.processes import KINDS, memory_of_processes, trainer_id, view_workers
from hvp_ray.config import RunConfig
from hvp_ray.data.digits import DigitsSource
from hvp_ray.launch.driver import launch
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.launch.watch import Watchers
from hvp_ray.recipes import get_recipe
from hvp_ray.runs.progress import Progress
from hvp_ray.tracking.run_log import METRICS, last_recorded_step, read_records

STEPS_PER_KILL = 5
KILLS_PER_TRAINER_KILL = 50
STEPS_AFTER_LAST_KILL = 100
MOST_PAUSE_SECONDS = 0.5
BOUND_MB_PER_1000_STEPS = 1.0
NUM_IMAGES = 400
SAMPLE_SECONDS = 1.0
CSV_ROWS = 250


@dataclasses.dataclass(slots=True)
class Outcome:
    """Figures of a part, the words for them, and what is wrong."""

    figures: dict[str, tuple[float, str]]
    """Name -> value and unit."""
    words: str
    broken: list[str]


class WatchedRun:
    """A run in this process's main thread; others ask how far it is."""

    def __init__(self) -> None:
        self.steps_done = 0
        self._ended = threading.Event()

    def launch(self, config: RunConfig) -> dict[str, Any]:
        """Run to the end; return the summary."""
        watchers = Watchers(announce=lambda _: None, show_progress=self._take, show_message=lambda _: None)
        try:
            return launch(config, watchers)[0]
        finally:
            self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Wait; return whether the run goes on."""
        return not self._ended.wait(seconds)

    def _take(self, progress: Progress) -> None:
        self.steps_done = progress.steps_done


def write_images(folder: Path) -> None:
    """Write digits as a folder of images: a view worker that reads them starts faster than with scikit-learn."""
    source = DigitsSource()
    folder.mkdir()
    (folder / "digits").mkdir()
    for sample_id, image in enumerate(source.read(range(NUM_IMAGES))):
        (folder / "digits" / f"{sample_id:04d}.png").write_bytes(image)


def small_config(output: Path, name: str, *, num_steps: int, checkpoint_every_steps: int) -> RunConfig:
    """Digits, a very narrow network, batches of 110 kB: smaller ones would not go through the object store."""
    recipe = get_recipe("simsiam-digits")
    backbone = dataclasses.replace(recipe.method.backbone, channels=(4, 8, 16, 32))
    global_views = dataclasses.replace(recipe.views.global_views, size_px=12)
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, name=name, output=str(output)),
        views=dataclasses.replace(recipe.views, global_views=global_views, evaluation_resize_px=12),
        method=dataclasses.replace(recipe.method, backbone=backbone, projector_dim=32, predictor_hidden_dim=16),
        selection=dataclasses.replace(recipe.selection, num_views=16),
        training=dataclasses.replace(
            recipe.training, num_steps=num_steps, images_per_step=16, checkpoint_every_steps=checkpoint_every_steps
        ),
        tracking=dataclasses.replace(
            recipe.tracking, knn_images=100, num_figure_images=0, log_every_steps=1, selection_images_per_epoch=160
        ),
        cluster=dataclasses.replace(recipe.cluster, num_view_workers=1),
    )


def recorded_steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_records(run_dir, METRICS)]


def last_step(run_dir: Path) -> int:
    """Return the last step in the log; 0: none yet."""
    return last_recorded_step(run_dir)


@contextlib.contextmanager
def held_back(trainer: int | None) -> Iterator[None]:
    """Stop a trainer for a while. None: nobody."""
    process = psutil.Process(trainer) if trainer is not None and psutil.pid_exists(trainer) else None
    if process is not None:
        process.suspend()
    try:
        yield
    finally:
        if process is not None:
            process.resume()


def kill_at_random(run: WatchedRun, run_dir: Path, *, num_kills: int, seed: int = 0) -> tuple[int, int]:
    """Kill while the run goes on; return how many view workers and trainers were killed.

    Between two kills at least one step is done, so the run is not starved; a trainer that would be done before all kills are
    is held back until the next one.
    """
    generator = np.random.default_rng(seed)
    workers_killed = trainers_killed = 0
    every = min(KILLS_PER_TRAINER_KILL, num_kills)
    step_before = 0
    while workers_killed < num_kills and run.wait(0.01):
        step = last_step(run_dir)
        if step == step_before:
            continue
        trainer = trainer_id(run_dir)
        with held_back(trainer if step > STEPS_PER_KILL * (workers_killed + 1) else None):
            run.wait(float(generator.uniform(0.0, MOST_PAUSE_SECONDS)))
            candidates = view_workers()
            try:
                candidates[int(generator.integers(len(candidates)))].kill()
            except (ValueError, psutil.NoSuchProcess):
                continue  # none is up
        step_before = last_step(run_dir)
        workers_killed += 1
        if workers_killed % every == every // 2:
            assert trainer is not None
            psutil.Process(trainer).kill()
            trainers_killed += 1
    return workers_killed, trainers_killed


def soak_kills(folder: Path, num_kills: int) -> Outcome:
    num_steps = STEPS_PER_KILL * num_kills + STEPS_AFTER_LAST_KILL
    write_images(folder / "images")

    def config(name: str) -> RunConfig:
        small = small_config(folder, name, num_steps=num_steps, checkpoint_every_steps=20)
        return dataclasses.replace(
            small,
            data=dataclasses.replace(small.data, source=str(folder / "images"), test_fraction=0.0),
            tracking=dataclasses.replace(small.tracking, uri="none"),
            cluster=dataclasses.replace(small.cluster, num_view_workers=4, max_trainer_failures=num_kills),
        )

    undisturbed = pretrain_in_process(config("undisturbed"))
    assert undisturbed is not None
    run = WatchedRun()
    with ThreadPoolExecutor(1) as background:
        killing = background.submit(kill_at_random, run, folder / "killed", num_kills=num_kills)
        summary = run.launch(config("killed"))
        workers_killed, trainers_killed = killing.result()
    same_weights = summary["weights_digest"] == undisturbed["weights_digest"]
    once = recorded_steps(folder / "killed") == list(range(1, num_steps + 1))
    quarantined = summary["num_quarantined_images"]
    wrong = {
        f"only {workers_killed} of {num_kills} kills before the run ended": workers_killed < num_kills,
        "other weights": not same_weights,
        "steps are missing or stand twice": not once,
        "images are quarantined or unreadable": summary["num_unreadable_images"] > 0,
        "spilled": summary["spilled_bytes"] > 0,
        "trainers were not started again as often as they were killed": summary["num_resumes"] != trainers_killed,
    }
    figures = {
        "soak.kills.view_workers": (workers_killed, "kills"),
        "soak.kills.trainers": (trainers_killed, "kills"),
        "soak.kills.steps": (num_steps, "steps"),
        "soak.kills.worker_restarts": (summary["num_worker_restarts"], "restarts"),
        "soak.kills.quarantined_images": (quarantined, "images"),
        "soak.kills.same_weights": (float(same_weights), "1: yes"),
        "soak.kills.every_step_once": (float(once), "1: yes"),
    }
    words = (
        f"{workers_killed} view workers and {trainers_killed} trainers killed in {num_steps:,} steps, "
        f"{summary['num_worker_restarts']} restarts of workers, {quarantined} images quarantined, "
        f"{'same' if same_weights else 'OTHER'} weights, every step {'once' if once else 'NOT once'}"
    )
    return Outcome(figures, words, [text for text, is_so in wrong.items() if is_so])


def sample_memory(run: WatchedRun, run_dir: Path) -> list[Sample]:
    samples: list[Sample] = []
    started_at = time.monotonic()
    while run.wait(SAMPLE_SECONDS):
        if run.steps_done > 0:
            seconds = time.monotonic() - started_at
            samples.append(Sample(step=run.steps_done, seconds=seconds, rss_bytes=memory_of_processes(run_dir)))
    return samples


def soak_memory(folder: Path, num_steps: int, output: Path, name: str) -> Outcome:
    from_step = num_steps // 5
    run = WatchedRun()
    with ThreadPoolExecutor(1) as background:
        sampling = background.submit(sample_memory, run, folder / "memory")
        summary = run.launch(small_config(folder, "memory", num_steps=num_steps, checkpoint_every_steps=200))
        samples = [sample for sample in sampling.result() if sample.step < num_steps]  # then it evaluates
    kinds = [*KINDS, "driver", "trainer alone"]
    write_csv(output / f"{name}.csv", thin_out(samples, num_kept=CSV_ROWS), kinds)
    draw(output / f"{name}.png", samples, list(KINDS), from_step=from_step, bound_mb=BOUND_MB_PER_1000_STEPS)
    growth = {kind: growth_mb_per_1000_steps(samples, kind, from_step=from_step) for kind in kinds}
    broken = [
        f"{kind} grows by {growth[kind]} MB per 1,000 steps"
        for kind in KINDS
        if (slope := growth[kind]) is None or slope >= BOUND_MB_PER_1000_STEPS
    ]
    if summary["spilled_bytes"]:
        broken.append(f"{summary['spilled_bytes']} bytes were spilled")
    figures = {
        f"soak.memory.{kind.replace(' ', '_')}": (value, "MB per 1,000 steps")
        for kind, value in growth.items()
        if value is not None
    }
    figures |= {
        "soak.memory.steps": (num_steps, "steps"),
        "soak.memory.spilled": (summary["spilled_bytes"], "bytes"),
    }
    words = (
        f"{num_steps:,} steps ({summary['view_bytes'] / 1e6:.0f} MB of views), MB per 1,000 steps: "
        + ", ".join(f"{kind} {value:+.2f}" for kind, value in growth.items() if value is not None)
        + f"; {summary['spilled_bytes']} bytes spilled"
    )
    return Outcome(figures, words, broken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of view workers (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10_000, help="of the run for memory (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    parser.add_argument("--name", default=f"soak-cpu-{time.strftime('%Y-%m-%d')}", help="default: %(default)s")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    started_at = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="hvp_ray-soak-") as folder,
        open_results(options.output / f"{options.name}.jsonl", describe_machine("torch", "ray")) as keep,
    ):
        for part in ("kills", "steps"):
            if getattr(options, part) <= 0:
                continue
            if part == "kills":
                outcome = soak_kills(Path(folder), options.kills)
            else:
                outcome = soak_memory(Path(folder), options.steps, options.output, options.name)
            print(f"{part}: {outcome.words} ({time.monotonic() - started_at:.0f} s)", flush=True)
            keep({"name": name, "value": value, "unit": unit} for name, (value, unit) in outcome.figures.items())
            outcomes.append(outcome)
    broken = [text for outcome in outcomes for text in outcome.broken]
    verdict = f"BROKEN: {'; '.join(broken)}" if broken else "all bounds hold"
    print(f"soak: {verdict}. {'. '.join(outcome.words for outcome in outcomes)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
