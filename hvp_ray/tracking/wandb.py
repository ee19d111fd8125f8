"""Weights & Biases as a tracker of a run: settings, metrics, final values and figures, online or offline.

The id of the run in W&B follows from the run, so a resume continues it. Online, the server says which steps it has. Offline
there is one folder per attempt, and a killed process leaves an incomplete one. It is deleted and written again from the log.
`wandb sync` sends them.

W&B takes rows in the order of writing, and answers of evaluations come later than their steps. So both kinds of records have
a step of their own, which is their x-axis.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hvp_ray.extras import require_extra
from hvp_ray.tracking.feed import Ending, Feed, Record
from hvp_ray.tracking.run_log import EVALUATIONS, METRICS

FOLDER = "wandb"

_STEPS = {METRICS: "step", EVALUATIONS: "eval/step"}
"""Kind of records -> the column of its steps."""
_CONNECT_SECONDS, _FINISH_SECONDS = 30.0, 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbRun:
    """The description of a run that is sent to W&B."""

    place: ClassVar[tuple[str, ...]] = ("project", "run_id")

    project: str
    run_id: str
    run_name: str
    group: str | None
    """The comparison that the run belongs to."""
    job_type: str | None
    """Its arm in the comparison."""
    config: dict[str, Any]

    @property
    def title(self) -> str:
        """Name of the tracker, for messages."""
        return "W&B"


def check_wandb() -> None:
    """Check that W&B is installed.

    Raises:
        ConfigError: it is not; the message has the command that installs it.
    """
    _require()


def _require() -> Any:
    return require_extra("wandb", extra="wandb", purpose="tracking.loggers=wandb")


class WandbFeed(Feed):
    """Feeds one run of W&B."""

    state_file = "wandb.json"

    def __init__(
        self,
        run: WandbRun,
        run_dir: Path,
        *,
        keep_state: Callable[[], None] = lambda: None,
        watches_system: bool = True,
    ) -> None:
        """See `Feed`."""
        self._description = run
        self._run: Any = None
        super().__init__(run, run_dir, keep_state=keep_state, watches_system=watches_system)

    def connect(self) -> dict[str, int]:
        """Open the run, or open it again; the server, or the state of complete offline folders, says what W&B has."""
        wandb = _require()
        if self._run is not None:
            previous, self._run = self._run, None
            previous.finish(exit_code=1)
        self._delete_incomplete_folders()
        try:
            self._run = self._open(wandb)
        except Exception:
            wandb.teardown(exit_code=1)  # its service keeps the id of a run that it could not open
            raise
        self._axes: set[str] = set()
        self._steps = self._known_steps()
        return dict(self._steps)

    def send(self, kind: str, records: list[Record]) -> None:
        """Send one row for each record."""
        axis = _STEPS[kind]
        for record in records:
            for group in {name.partition("/")[0] for name in record["metrics"]} - self._axes:
                self._axes.add(group)
                self._run.define_metric(f"{group}/*", step_metric=axis)
            self._run.log({**record["metrics"], axis: record["step"], "_timestamp": record["time"]})
            self._steps[kind] = record["step"]

    def end(self, ending: Ending) -> None:
        """Send final values and figures, and end the run."""
        self._run.summary.update(ending.values)
        image = _require().Image
        figures = {f"figures/{path.stem}": image(str(path)) for path in ending.artifacts if path.suffix == ".png"}
        if figures:
            self._run.log(figures)
        run, self._run = self._run, None
        run.finish(exit_code=0 if ending.is_finished else 1)
        if run.offline:
            complete = [*self._state.get("complete_folders", []), Path(run.dir).parent.name]
            self._note(steps=self._steps, complete_folders=complete)

    def is_refusal(self, error: Exception) -> bool:
        """Tell whether W&B needs something of the user, such as a key."""
        errors = _require().errors
        return isinstance(error, errors.UsageError | errors.AuthenticationError)

    def _open(self, wandb: Any) -> Any:
        wanted = self._description
        return wandb.init(
            project=wanted.project,
            id=wanted.run_id,
            name=wanted.run_name,
            group=wanted.group,
            job_type=wanted.job_type,
            config=wanted.config,
            dir=str(self._run_dir),
            resume="allow",
            reinit="create_new",  # other runs of this process stay open
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                init_timeout=_CONNECT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                finish_timeout_raises=True,
                x_disable_stats=not self._watches_system,
                x_save_requirements=False,
            ),
        )

    def _known_steps(self) -> dict[str, int]:
        if not self._run.offline:
            return {kind: int(self._run.summary.get(axis, -1)) for kind, axis in _STEPS.items()}
        return dict(self._state.get("steps", {}))

    def _delete_incomplete_folders(self) -> None:
        for folder in (self._run_dir / FOLDER).glob(f"*run-*-{self._description.run_id}"):
            if folder.name not in self._state.get("complete_folders", []):
                shutil.rmtree(folder, ignore_errors=True)
