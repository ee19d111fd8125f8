"""What is recorded, how often, and where."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from hvp_ray.config.checks import AtLeast0, AtLeast1, Checked, Location

Logger = Literal["tensorboard", "wandb"]
"""A tracker that a run may be sent to besides MLflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig(Checked):
    """What is recorded, how often, and where."""

    path: ClassVar[str] = "tracking"

    uri: Annotated[str, Location("auto, none, or an MLflow tracking URI")] = "auto"
    """MLflow tracking URI. auto: MLFLOW_TRACKING_URI of the environment, else a SQLite file in `run.output`, which needs no
    server; no MLflow without the extra `mlflow`. If `run.output` is a URI, that file lies in the default output folder of the
    first trainer's machine, so a cluster whose nodes come and go needs a server. none: no MLflow."""

    loggers: tuple[Logger, ...] = ()
    """Trackers besides MLflow, each a copy of the run's log. tensorboard: event files in the run's folder. wandb: Weights &
    Biases, with its own environment variables (`WANDB_API_KEY`, `WANDB_ENTITY`, `WANDB_MODE=offline`)."""

    experiment: str = "hvp_ray"
    """Name of the MLflow experiment and of the W&B project."""

    log_every_steps: AtLeast1 = 1
    """Steps between recorded values. After a recorded random step, the next hard step is recorded too."""

    knn_neighbours: AtLeast1 = 20
    """Neighbours of k-NN with all labels (weighted vote, temperature 0.07)."""

    knn_images: AtLeast0 = 10_000
    """Largest number of training images, and of test images, in the final k-NN. 0: no k-NN."""

    knn_every_epochs: AtLeast0 = 0
    """Epochs between evaluations of the encoder by k-NN, which run beside training. 0: only at the end."""

    selection_images_per_epoch: AtLeast0 = 2_000
    """Images of each epoch whose plan, scores and choice are logged for hvp-ray analyse (approximately; rank
    0's part, about 200 bytes per image, and 4 for each pair and local view). 0: no log."""

    comparison: str | None = None
    """Comparison that the run belongs to, set by hvp-ray compare; a tag in MLflow."""

    arm: str | None = None
    """Arm of the comparison; a tag in MLflow."""

    num_figure_images: AtLeast0 = 6
    """Images in the figure of candidate views. 0: no figures and no page (`report.html`)."""
