"""Which processes do the work, and what Ray reserves for them."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from hvp_ray.config.checks import AtLeast0, AtLeast1, Checked, NonNegative, Positive, Range, require

RendererName = Literal["cpu", "dali-cpu", "dali-gpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig(Checked):
    """Processes and their resources. Only the numbers of trainers, `sharding`, `renderer` and `device` may change results."""

    path: ClassVar[str] = "cluster"

    num_trainers: AtLeast1 = 1
    """Training processes. Each takes images_per_step / num_trainers images of a step."""

    min_trainers: AtLeast1 | None = None
    """Elastic training: if nodes are lost, continue with this many trainers or more; if nodes join, with up to
    `num_trainers`. The images of a step stay equal, but the order of sums changes, so two such runs are not bit-equal.
    None: always `num_trainers`; the run waits for a lost node."""

    resize_check_seconds: Positive = 60.0
    """Seconds between an elastic run's checks for room for more trainers, which start from the newest checkpoint."""

    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: each trainer keeps a part of the weights, gradients and optimizer state of a Vision Transformer and gathers them
    block by block, for networks that do not fit a GPU. none: every trainer has all of them."""

    placement: Literal["auto", "labels", "anywhere"] = "auto"
    """How nodes are chosen. labels: the Ray resources `view` and `trainer` of a node say how many view workers and trainers
    it takes; the run waits for nodes that do not exist yet. anywhere: labels are ignored. auto: labels, if any node has
    them."""

    num_view_workers: AtLeast1 | Literal["auto"] = "auto"
    """Ray actors that render views. A number: that many, and those on a node that is drained are replaced. auto: one for each
    CPU that the trainers leave at the start, then more if trainers wait over 2 % of their time, and fewer if workers are
    idle."""

    max_view_workers: AtLeast1 = 256
    """Most view workers that `num_view_workers` auto starts. With `cpus_per_view_worker` 0 a run begins with 64 at most."""

    renderer: RendererName | Literal["auto"] = "auto"
    """Renderer of the view workers: cpu, dali-cpu or dali-gpu. auto: cpu."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the trainers. auto: cuda if the cluster has enough GPUs for them, else cpu."""

    batches_in_flight: AtLeast1 | Literal["auto"] = "auto"
    """Batches that each trainer prefetches. A view worker renders one batch at a time, so fewer batches than view workers
    per trainer leave some idle. auto: workers and finishers per trainer plus 2, at least 4, within the object stores."""

    cpus_per_trainer: NonNegative = 1.0
    """CPUs that Ray reserves for a trainer."""

    cpus_per_view_worker: NonNegative = 1.0
    """CPUs that Ray reserves for a view worker."""

    ship: Literal["views", "pixels"] = "views"
    """What is sent to the trainer's node. views: rendered views. pixels: each image decoded once and cropped to what its
    views use; view finishers on that node render them to the same bits (renderer cpu only). pixels is smaller for many
    views, or views that are large beside their images; `hvp-ray describe` computes both."""

    finishers_per_trainer: AtLeast1 = 1
    """View finishers beside each trainer with ship=pixels. Each adds `cpus_per_view_worker` CPUs to the trainer's
    reservation."""

    gpus_for_knn: NonNegative = 0.0
    """Fraction of a GPU that Ray reserves for the evaluation of `tracking.knn_every_epochs`. 0: it runs on a CPU."""

    gpus_per_trainer: Annotated[float, Range(above=0, most=1)] | Literal["auto"] = "auto"
    """GPUs that Ray reserves for a trainer on cuda. Less than 1 also limits its torch to that fraction of the device's
    memory. auto: 1, or what the view workers leave of each GPU if renderer dali-gpu has no GPU of its own."""

    gpus_per_dali_worker: NonNegative = 0.1
    """Fraction of a GPU that Ray reserves for a view worker with renderer dali-gpu. Ray does not enforce it: DALI's memory
    grows to what the largest batch needs."""

    object_store_mib: Annotated[int, Range(least=80)] | Literal["auto"] = "auto"
    """Object store of a local Ray (MiB). auto: three times the prefetched batches, at least 256, within this machine's
    memory."""

    late_factor: Annotated[float, Range(least=1)] = 8.0
    """A batch is requested from another worker after this many times the usual time, and more than `late_seconds`."""

    late_seconds: NonNegative = 30.0
    """Shortest time after which a batch is late; see `late_factor`."""

    stall_seconds: Positive = 600.0
    """The run stops with an error if it waits this long for the next batch."""

    max_trainer_failures: AtLeast0 = 3
    """How often trainers are restarted after a failure of one of them."""

    def check_together(self, prefix: str) -> None:
        """Check numbers of trainers, and what is shipped against renderer and finishers."""
        least, most = self.min_trainers, self.num_trainers
        allowed = f"1 to {prefix}num_trainers={most}, or None"
        require(least is None or least <= most, f"{prefix}min_trainers", least, allowed)
        allowed = f"1 with {prefix}ship=views, which has no finishers; set {prefix}ship=pixels"
        fits = self.ship == "pixels" or self.finishers_per_trainer == 1
        require(fits, f"{prefix}finishers_per_trainer", self.finishers_per_trainer, allowed)
        allowed = f"views with {prefix}renderer={self.renderer}, because DALI decodes and renders in one graph"
        fits = self.ship == "views" or self.renderer in ("auto", "cpu")
        require(fits, f"{prefix}ship", self.ship, allowed)

    @property
    def num_finishers(self) -> int:
        """View finishers beside each trainer; 0 if views are shipped."""
        return self.finishers_per_trainer if self.ship == "pixels" else 0

    @property
    def cpus_with_finishers(self) -> float:
        """CPUs that a trainer reserves: its own, and those of the view finishers beside it."""
        return self.cpus_per_trainer + self.num_finishers * self.cpus_per_view_worker
