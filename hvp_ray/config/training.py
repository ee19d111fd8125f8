"""How long a run trains, on how many images at once, in which precision."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from hvp_ray.config.checks import AtLeast1, Checked, PathOrUri, Range, require


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(Checked):
    """How long a run trains, on how many images at once, in which precision."""

    path: ClassVar[str] = "training"

    epochs: AtLeast1
    """Passes over the data. A last part smaller than one step is dropped."""

    num_steps: AtLeast1 | None = None
    """Train for exactly this many steps, which the schedules span. None: `epochs` decides."""

    images_per_step: Annotated[int, Range(least=2)]
    """Images per optimizer step over all trainers (the global batch)."""

    accumulation_steps: AtLeast1 = 1
    """Split each step into this many equal parts to save memory; gradients accumulate over the parts. BatchNorm, scores, and
    DINOv2's Sinkhorn-Knopp and KoLeo use one part at a time. SimCLR still contrasts all images of the step, which takes a
    second forward pass."""

    activation_checkpointing: bool = False
    """Keep only the inputs of a Vision Transformer's blocks, and compute the rest again in the backward pass. This takes less
    memory and one more forward pass of the trained views, and changes no bit. With `selection.reuse_student`, scoring keeps
    these inputs for all views."""

    checkpoint_every_steps: AtLeast1 = 500
    """Steps between checkpoints. One more is written at the end."""

    keep_checkpoints: AtLeast1 = 2
    """Number of newest checkpoints to keep."""

    torch_threads: AtLeast1 = 1
    """Threads of torch in each trainer on a CPU. Part of the run's identity, because it changes the order of sums."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward passes. bfloat16: autocast; losses and weights stay float32."""

    compile: bool = False
    """Use torch.compile for scoring and training; GPUs only."""

    cuda_graphs: bool = False
    """Replay compiled scoring as one CUDA graph, so that the host launches no kernels. For networks whose kernels are short.
    Scoring then keeps memory of its own, which training cannot use. Needs `compile`."""

    max_collapsed_steps: AtLeast1 | None = None
    """End the run once embeddings or teacher stay collapsed for this many consecutive steps, not counting the first 100.
    Judged on logged steps; the count restarts on resume. None: only warn."""

    initial_weights: PathOrUri | None = None
    """Backbone weights to start from, by path or URI: a run's folder, or a file (safetensors or torch) with the names of
    timm, torchvision, DINO, DINOv2, MoCo or Lightning. The run says what did not fit. None: random weights, or timm's with
    `method.backbone.pretrained`."""

    initial_run: PathOrUri | None = None
    """Folder of a run of the same method and network, to start from with all its weights: student, teacher, heads and
    centres of its newest checkpoint. Position embeddings are interpolated; optimizer and schedules begin anew. For a last
    phase at a higher resolution."""

    def check_together(self, prefix: str) -> None:
        """Check that the weights come from one place, and that graphs are compiled."""
        fits = self.compile or not self.cuda_graphs
        require(fits, f"{prefix}cuda_graphs", self.cuda_graphs, f"False without {prefix}compile=True")
        fits = self.initial_run is None or self.initial_weights is None
        require(fits, f"{prefix}initial_run", self.initial_run, f"None with {prefix}initial_weights")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the run."""
        return self.num_steps or self.epochs * steps_per_epoch
