"""All trackers of a run: which feed serves which description, what an ended run sends, and what one still lacks."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hvp_ray.config import Logger
from hvp_ray.files import write_file
from hvp_ray.tracking.feed import Feed, read_state
from hvp_ray.tracking.mlflow import MlflowFeed, MlflowRun
from hvp_ray.tracking.tensorboard import TensorboardFeed, TensorboardRun, check_tensorboard
from hvp_ray.tracking.wandb import WandbFeed, WandbRun, check_wandb

FINISH_SECONDS = 120.0
"""Longest wait at the end of a run for trackers that do not answer."""

TrackedRun = MlflowRun | TensorboardRun | WandbRun
"""The description of a run that one tracker gets."""

_FEEDS: dict[type[TrackedRun], type[Feed]] = {
    MlflowRun: MlflowFeed,
    TensorboardRun: TensorboardFeed,
    WandbRun: WandbFeed,
}
_CHECKS: dict[Logger, Callable[[], None]] = {"tensorboard": check_tensorboard, "wandb": check_wandb}


def check_loggers(loggers: Sequence[Logger]) -> None:
    """Check that the packages of these trackers are installed.

    Raises:
        ConfigError: one is missing; the message has the command that installs it.
    """
    for logger in loggers:
        _CHECKS[logger]()


def start_feeds(runs: Sequence[TrackedRun], run_dir: Path, keep_state: Callable[[str], None]) -> list[Feed]:
    """Start a feed for each description; `keep_state` gets the name of a state file that the next attempt needs."""
    feeds = []
    for run in runs:
        kind = _FEEDS[type(run)]
        feeds.append(kind(run, run_dir, keep_state=partial(keep_state, kind.state_file)))
    return feeds


def finish_feeds(
    feeds: Sequence[Feed],
    *,
    status: str,
    artifacts: Sequence[Path] = (),
    values: dict[str, float] | None = None,
    timeout_seconds: float,
) -> bool:
    """End all feeds at once; return whether everything arrived in time."""
    for feed in feeds:
        feed.begin_end(
            status=status, artifacts=list(artifacts), values=dict(values or {}), timeout_seconds=timeout_seconds
        )
    ends = [feed.wait_for_end() for feed in feeds]
    return all(ends)


def abandon_feeds(feeds: Sequence[Feed]) -> None:
    """Stop all feeds of a run that goes on in another process, whose feeds send the rest."""
    for feed in feeds:
        feed.abandon()


def final_values(summary: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a summary under their names in trackers."""
    return {
        f"summary/{name}": float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def final_artifacts(run_dir: Path) -> list[Path]:
    """Return the files of an ended run that trackers get; each takes what it can show."""
    figures = sorted((run_dir / "figures").glob("*.png"))
    files = [run_dir / name for name in ("backbone.safetensors", "config.json", "report.html")]
    return [path for path in (*figures, *files) if path.exists()]


def lacks_records(run_dir: Path) -> bool:
    """Tell whether a tracker lacks something of an ended run."""
    return bool(_incomplete(run_dir))


def catch_up(run_dir: Path) -> dict[str, Any] | None:
    """Send what trackers lack of an ended run; return the summary with their ids, or None: one is still unreachable."""
    path = run_dir / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text())
    feeds = [_FEEDS[type(run)](run, run_dir, watches_system=False) for run in _incomplete(run_dir)]
    done = finish_feeds(
        feeds,
        status="FINISHED",
        artifacts=final_artifacts(run_dir),
        values=final_values(summary),
        timeout_seconds=FINISH_SECONDS,
    )
    if not done:
        return None
    for feed in feeds:
        summary |= feed.facts()
    write_file(str(path), (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _incomplete(run_dir: Path) -> list[TrackedRun]:
    states = {kind: read_state(run_dir, feed.state_file) for kind, feed in _FEEDS.items()}
    return [kind(**state["run"]) for kind, state in states.items() if not state.get("complete", True)]
