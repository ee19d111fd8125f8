"""A run as one value: all sections, and the conditions across them."""

import dataclasses
from dataclasses import dataclass

from hvp_ray.config.checks import Checked, check, require
from hvp_ray.config.cluster import ClusterConfig
from hvp_ray.config.data import DataConfig
from hvp_ray.config.method import BackboneConfig, MethodConfig
from hvp_ray.config.optimizer import OptimizerConfig
from hvp_ray.config.run import RunSettings
from hvp_ray.config.selection import SelectionConfig
from hvp_ray.config.tracking import TrackingConfig
from hvp_ray.config.training import TrainingConfig
from hvp_ray.config.views import ViewsConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Checked):
    """Everything that determines a run."""

    recipe: str
    """Name of the recipe that this value was made from."""

    run: RunSettings = dataclasses.field(default_factory=RunSettings)
    data: DataConfig
    views: ViewsConfig
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    method: MethodConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Check all sections with the full paths of their fields."""
        check(self, "")

    def check_together(self, prefix: str) -> None:
        """Check conditions across sections."""
        self._check_channels()
        self._check_images_per_step()
        self._check_views_of_method()
        self._check_weighting()
        self._check_reuse()
        self._check_rescue()
        self._check_sharding()
        if self.selection.rule == "predicted":
            each, probed = self.training.images_per_step // self.cluster.num_trainers, self.selection.probe_images
            require(probed <= each, "selection.probe_images", probed, f"at most the {each} images of a trainer")
        scoring_px, size_px = self.selection.scoring_resolution_px, self.views.global_views.size_px
        allowed = f"at most views.global_views.size_px={size_px}"
        require(scoring_px is None or scoring_px <= size_px, "selection.scoring_resolution_px", scoring_px, allowed)
        checkpointing = self.training.activation_checkpointing
        is_compiled = self.training.compile and checkpointing
        require(not is_compiled, "training.activation_checkpointing", checkpointing, "False with training.compile=True")
        compiles_on_cpu = self.training.compile and self.cluster.device == "cpu"
        require(not compiles_on_cpu, "training.compile", self.training.compile, "False with cluster.device=cpu")

    def _check_channels(self) -> None:
        channels, given = self.data.channels, self.method.backbone.in_channels
        allowed = f"data.channels={channels}, or None"
        require(given in (None, channels), "method.backbone.in_channels", given, allowed)
        allowed = f"auto or cpu with data.channels={channels}: DALI renders RGB"
        is_rgb_or_cpu = channels == 3 or self.cluster.renderer in ("auto", "cpu")
        require(is_rgb_or_cpu, "cluster.renderer", self.cluster.renderer, allowed)
        allowed = f"{len(self.views.mean)} values, as views.mean"
        require(len(self.views.std) == len(self.views.mean), "views.std", self.views.std, allowed)

    def _check_images_per_step(self) -> None:
        images, parts, cluster = self.training.images_per_step, self.training.accumulation_steps, self.cluster
        for trainers in range(cluster.min_trainers or cluster.num_trainers, cluster.num_trainers + 1):
            allowed = f"a multiple of cluster.num_trainers={trainers}"
            if cluster.min_trainers is not None:
                numbers = f"cluster.min_trainers={cluster.min_trainers} to cluster.num_trainers={cluster.num_trainers}"
                allowed = f"a multiple of every number from {numbers}"
            require(images % trainers == 0, "training.images_per_step", images, allowed)
            each = images // trainers
            allowed = f"a divisor of the {each} images of a trainer that leaves 2 or more"
            fits = each % parts == 0 and each // parts >= min(2, each)
            require(fits, "training.accumulation_steps", parts, allowed)

    def _check_views_of_method(self) -> None:
        method, selection, views = self.method, self.selection, self.views
        if method.uses_local_views:
            allowed = f"None with {method.name}: set selection.num_global_views and selection.num_local_views"
            require(selection.num_views is None, "selection.num_views", selection.num_views, allowed)
        else:
            number, allowed = selection.num_global_views, f"None with {method.name}: set selection.num_views"
            require(number is None, "selection.num_global_views", number, allowed)
        fits = (views.local_views is not None) == bool(selection.num_local_views)
        allowed = "a number if views.local_views is set, else None"
        require(fits, "selection.num_local_views", selection.num_local_views, allowed)
        fits = (views.masks is not None) == method.uses_masks
        allowed = f"set with {method.name}" if method.uses_masks else f"None with {method.name}, which has no masks"
        require(fits, "views.masks", views.masks, allowed)

    def _check_weighting(self) -> None:
        selection, number = self.selection, self.selection.num_candidate_views
        odd = number // 2
        num_pairs = (number - odd) * odd if self.views.slots_keep_transforms else number * (number - 1) // 2
        fits = selection.weight_top_k is None or selection.weight_top_k <= num_pairs
        require(
            fits, "selection.weight_top_k", selection.weight_top_k, f"at most the {num_pairs} pairs of {number} views"
        )
        allowed = "mean with method.averaged_target=True, whose loss is not a mean over pairs"
        fits = selection.weighting == "mean" or self.method.trains_on_pairs
        require(fits, "selection.weighting", selection.weighting, allowed)

    def _check_reuse(self) -> None:
        if not self.selection.reuse_student:
            return
        conditions = {
            "training.accumulation_steps=1": self.training.accumulation_steps == 1,
            "scoring at full resolution in the precision of training": self.scores_as_in_training,
            "training.cuda_graphs=False": not self.training.cuda_graphs,
        }
        for allowed, holds in conditions.items():
            require(holds, "selection.reuse_student", self.selection.reuse_student, f"False without {allowed}")

    def _check_rescue(self) -> None:
        share = self.selection.rescue_share
        together = self.training.images_per_step // self.cluster.num_trainers // self.training.accumulation_steps
        least = 2 if self.method.contrasts_images else 1  # one image would have no negatives
        allowed = (
            f"0.0, or a share that rescues {least} or more of the {together} images that a trainer scores together "
            f"(training.images_per_step, training.accumulation_steps)"
        )
        require(not share or round(share * together) >= least, "selection.rescue_share", share, allowed)

    def _check_sharding(self) -> None:
        sharding, conditions = (
            self.cluster.sharding,
            {
                "selection.reuse_student=False": not self.selection.reuse_student,
                "training.compile=False": not self.training.compile,
                "optimizer.fused=False with optimizer.name=sgd": not (
                    self.optimizer.fused and self.optimizer.name == "sgd"
                ),
            },
        )
        for allowed, holds in conditions.items():
            require(sharding == "none" or holds, "cluster.sharding", sharding, f"none without {allowed}")

    @property
    def encoder(self) -> BackboneConfig:
        """The encoder for the channels of the images."""
        return dataclasses.replace(self.method.backbone, in_channels=self.data.channels)

    @property
    def scores_as_in_training(self) -> bool:
        """Whether scoring forwards the views exactly as training does."""
        full_resolution = self.selection.scoring_resolution_px in (None, self.views.global_views.size_px)
        return full_resolution and self.selection.scoring_precision in ("training", self.training.precision)

    def of_one_trainer(self) -> "RunConfig":
        """Return a run whose only trainer does what one trainer of this run does, not compiled."""
        return dataclasses.replace(
            self,
            training=dataclasses.replace(
                self.training, images_per_step=self.images_per_rank, compile=False, cuda_graphs=False
            ),
            cluster=dataclasses.replace(self.cluster, num_trainers=1, min_trainers=None),
        )

    @property
    def images_per_rank(self) -> int:
        """Images of one step on one trainer; in elastic training the largest number."""
        return self.training.images_per_step // (self.cluster.min_trainers or self.cluster.num_trainers)
