"""Run training under random faults, and compare the weights with those of an undisturbed run.

python benchmarks/chaos.py [--minutes N] [--seed N] [--run N] [--output FOLDER]

Four hosts (network namespaces): Ray's head, a trainer, view workers, and MLflow with an S3 server. The images include damaged
and hostile files. One run is undisturbed. Then runs follow, in turns on a disk and in a bucket, until the time is up. In
each, faults begin at drawn steps and last for drawn times, several at once: kills, pauses, cut and slow links, a full disk, a
full object store, outages of MLflow and the bucket, jumping clocks (--help lists them). A run that ends with an error is
started again by its name, as a user would.

Each run must have the weights of the calm one, bit for bit, each step once, and all points in MLflow. `--run N` repeats run
N of the seed alone. The last line has the outcome; the exit status is 1 if anything is broken, and the logs stay.

Needs root and `ip` (iproute2). Without root it skips everything with a sentence and ends with 0.
"""

import argparse
import contextlib
import itertools
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

from benchmarks.chaotic.cluster import CALM, ChaosCluster, chaos_cluster
from benchmarks.chaotic.faults import NoTargetError, Undo, begin, impossible_kinds
from benchmarks.chaotic.hosts import is_possible
from benchmarks.chaotic.plan import KINDS, Event, draw_plan
from benchmarks.results_file import describe_machine, open_results

NUM_STEPS = 400
EVENTS_PER_RUN = 10
MOST_STARTS = 20
PATIENCE_SECONDS = 600.0
"""A run is stuck if it records no step for this time after the last fault."""
PAUSE_WINDOW_SECONDS = 90.0
POLL_SECONDS = 0.2
RESTART_SECONDS = 5.0


@dataclass(slots=True)
class Happened:
    """A fault that has begun."""

    event: Event
    began_at: float
    undo: Undo | None
    """None: it is over."""


@dataclass(slots=True)
class Outcome:
    """A run and what happened to it."""

    name: str
    happened: list[Happened] = field(default_factory=list)
    steps: list[tuple[float, int]] = field(default_factory=list)
    """Time and number of each newly recorded step that was seen."""
    num_starts: int = 0
    errors: list[str] = field(default_factory=list)
    """Last lines of starts that ended with an error."""
    broken: str | None = None

    def pause_after(self, happened: Happened) -> float | None:
        """Return the longest time without a new step, s, from the fault's begin to `PAUSE_WINDOW_SECONDS` after its end.

        None: no step came after it.
        """
        end = happened.began_at + happened.event.seconds + PAUSE_WINDOW_SECONDS
        times = [happened.began_at, *(moment for moment, _ in self.steps if happened.began_at < moment)]
        return max((after - before for before, after in itertools.pairwise(times) if before < end), default=None)


def say(text: str) -> None:
    print(f"chaos: {text}", flush=True)


def do_run(cluster: ChaosCluster, name: str, plan: list[Event], *, where: str) -> Outcome:
    """Start a run, disturb it by its plan, start it again whenever it ends with an error; return what happened."""
    outcome, waiting = Outcome(name), list(plan)
    job = None
    restart_at = last_progress = time.monotonic()
    try:
        while True:
            now = time.monotonic()
            for happened in outcome.happened:
                if happened.undo is not None and now > happened.began_at + happened.event.seconds:
                    happened.undo()
                    happened.undo = None
                    last_progress = now
            if job is None and now > restart_at:
                job = cluster.start_job(name, where=where, num_steps=NUM_STEPS)
                outcome.num_starts += 1
            if job is not None and (status := job.poll()) is not None:
                if status == 0:
                    if waiting:
                        say(f"{name}: {len(waiting)} of {len(plan)} faults did not begin")
                    if waiting and not outcome.happened:
                        outcome.broken = "no fault began, because no step of the run was seen"
                    return outcome
                job, restart_at = None, now + RESTART_SECONDS
                lines = cluster.job_log(name).read_text(errors="replace").splitlines()
                outcome.errors.append(f"ended with {status}: {lines[-1] if lines else ''}")
                say(f"{name}: {outcome.errors[-1][:200]}")
                if any(line.startswith("Traceback") for line in lines):
                    outcome.broken = "the program ended with a traceback instead of a sentence"
                    return outcome
                if outcome.num_starts >= MOST_STARTS:
                    outcome.broken = f"it was started {MOST_STARTS} times and is not done"
                    return outcome
            step = cluster.last_step(name)
            if step > (outcome.steps[-1][1] if outcome.steps else 0):
                outcome.steps.append((now, step))
                last_progress = now
            if waiting and step >= waiting[0].step:
                with contextlib.suppress(NoTargetError):
                    undo = begin(cluster, waiting[0])
                    event = waiting.pop(0)
                    outcome.happened.append(Happened(event, time.monotonic(), undo))
                    duration = f" for {event.seconds:.0f} s" if event.seconds else ""
                    say(f"{name}: step {step}: {event.kind}{duration}")
            if now > last_progress + PATIENCE_SECONDS:
                outcome.broken = f"no step for {PATIENCE_SECONDS:.0f} s after step {step}"
                return outcome
            time.sleep(POLL_SECONDS)
    finally:
        for happened in outcome.happened:
            if happened.undo is not None:
                happened.undo()
                happened.undo = None
        if job is not None and job.poll() is None:
            job.kill()


def judge(cluster: ChaosCluster, outcome: Outcome, *, where: str) -> None:
    """Compare a run with the calm one; record what is wrong, and remove it if nothing is."""
    if outcome.broken is None:
        same, words = cluster.judge(outcome.name, where=where)
        outcome.broken = None if same else words
        say(words)
    if outcome.broken is None:
        shutil.rmtree(cluster.runs / outcome.name, ignore_errors=True)
    else:
        cluster.keep_broken(outcome.name)


def run_numbers(options: argparse.Namespace, *, end: float) -> Iterator[int]:
    """Yield the numbers of the runs to do until the time is up; one at least."""
    if options.run is not None:
        yield options.run
        return
    yield 0
    for number in itertools.count(1):
        if time.monotonic() > end:
            return
        yield number


def table_of(outcomes: list[Outcome]) -> list[dict[str, object]]:
    """Return for each kind of fault how often it happened and the pauses after it."""
    rows = []
    for kind in KINDS:
        of_kind = [o.pause_after(h) for o in outcomes for h in o.happened if h.event.kind == kind.title]
        pauses = [pause for pause in of_kind if pause is not None]
        row = {"name": f"chaos.{kind.title.replace(' ', '_')}", "value": len(of_kind), "unit": "times"}
        if pauses:
            row |= {"median_pause_s": round(statistics.median(pauses), 1), "longest_pause_s": round(max(pauses), 1)}
        if of_kind:
            rows.append(row)
    return rows


def main() -> int:
    kinds = "kinds of faults: " + ", ".join(kind.title for kind in KINDS)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=kinds, formatter_class=formatter)
    parser.add_argument("--minutes", type=float, default=60, help="no run is begun afterwards (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all plans (default: %(default)s)")
    parser.add_argument("--run", type=int, help="only this run of the seed")
    parser.add_argument("--output", type=Path, help="folder for the figures, chaos-<date>.jsonl (default: none)")
    options = parser.parse_args()
    if not is_possible():
        say("skipped: needs root and ip (iproute2) with network namespaces")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts are ended
    folder = Path(tempfile.mkdtemp(prefix="hvpch", dir="/tmp"))  # short: Ray's sockets lie below it
    outcomes: list[Outcome] = []
    started_at = time.monotonic()
    with chaos_cluster(folder) as cluster:
        reasons = impossible_kinds(cluster)
        for kind, reason in reasons.items():
            say(f"left out: {kind}: {reason}")
        say("four hosts are up; the calm run begins")
        calm = do_run(cluster, CALM, [], where="disk")
        if calm.broken is not None or calm.num_starts > 1:
            say(f"BROKEN: the calm run: {calm.broken or calm.errors}; logs are in {folder}")
            return 1
        for number in run_numbers(options, end=started_at + 60 * options.minutes):
            where = ("disk", "bucket")[number % 2]
            plan = draw_plan(
                options.seed,
                number,
                num_steps=NUM_STEPS,
                num_events=EVENTS_PER_RUN,
                where=where,
                without=frozenset(reasons),
            )
            outcomes.append(do_run(cluster, f"run-{number}", plan, where=where))
            judge(cluster, outcomes[-1], where=where)
            if outcomes[-1].broken is not None:
                break
    rows = table_of(outcomes)
    say(f"{'fault':38} {'times':>5} {'median pause, s':>16} {'longest, s':>11}")
    for row in rows:
        kind = str(row["name"]).removeprefix("chaos.").replace("_", " ")
        pauses = (str(row.get(name, "-")) for name in ("median_pause_s", "longest_pause_s"))
        say("{:38} {:5} {:>16} {:>11}".format(kind, row["value"], *pauses))
    broken = [f"{outcome.name}: {outcome.broken}" for outcome in outcomes if outcome.broken is not None]
    path = options.output / f"chaos-{time.strftime('%Y-%m-%d')}.jsonl" if options.output else None
    with open_results(path, describe_machine("torch", "ray") | {"seed": options.seed}) as keep:
        keep(rows)
    restarts = sum(outcome.num_starts - 1 for outcome in outcomes)
    verdict = f"BROKEN: {'; '.join(broken)}; logs are in {folder}" if broken else "OK"
    say(
        f"{verdict}: {sum(len(o.happened) for o in outcomes)} faults of {len(rows)} kinds in {len(outcomes)} runs of "
        f"{NUM_STEPS} steps, seed {options.seed}, {(time.monotonic() - started_at) / 60:.0f} minutes; {restarts} times a run "
        f"ended with an error and was started again; "
        + ("" if broken else "weights equal to the bit, every step once, all points in MLflow")
    )
    if not broken:
        shutil.rmtree(folder)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
