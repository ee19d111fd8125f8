"""A run as a typed, frozen value: what `recipes` build, what the command line overrides, what is logged.

Every field says its meaning, its unit and where its default comes from. `None` means off, and the field says so.
Checks happen on construction and raise `ConfigError` with path, value and what is allowed. Nothing that is computed
at run time is stored here. `identity.py` says which fields may change a bit of the result.
"""

import dataclasses
import importlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from hvp_ray.credentials import refuse_credentials
from hvp_ray.errors import ConfigError
from hvp_ray.randomness import check_seed

Rule = Literal["hardest", "first", "random", "easiest", "min_iou", "all_pairs"]
"""Which pair of views is trained on.

hardest: the pair with the largest loss under the current weights (HVP). first: views 0 and 1, only they are rendered
(the vanilla arm). Controls: random (a random pair of the V views), easiest (smallest loss), min_iou (crops that
overlap least; no model involved), all_pairs (mean loss over all pairs).
"""

RendererName = Literal["cpu", "dali-cpu", "dali-gpu"]
RULES_THAT_SCORE: frozenset[str] = frozenset({"hardest", "easiest"})


def _require(condition: bool, path: str, value: object, allowed: str) -> None:  # noqa: FBT001 (an assertion reads so)
    if not condition:
        raise ConfigError(f"{path}={value!r} is not allowed: {allowed}")


def _require_probability(path: str, value: float) -> None:
    _require(0.0 <= value <= 1.0, path, value, "a probability from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Name, place and seed of a run."""

    name: str | None = None
    """Folder name of the run under `run.output`. None: a new unique name. The name of an existing run resumes it."""

    output: str | None = None
    """Folder that holds runs and the MLflow store, and that all trainers see; or a URI (s3://bucket/prefix, gs://, abfs://,
    hdfs://, file:///; a server that speaks S3: s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http), with credentials
    in the environment of every node, never in the URI. None: `runs/` in the working folder, or `hvp_runs/` in the home folder
    where the working folder is a temporary copy made by `ray job submit --working-dir`."""

    seed: int = 0
    """Seed of everything random: order, views, initial weights. 0 to 2**64 - 1."""

    resume: bool = True
    """Continue the run of this name where it exists. False: an existing run of this name is an error."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        refuse_credentials("run.output", self.output)
        if self.name is not None:
            allowed = "letters, digits, '.', '_' and '-', not beginning with '.' or '-', at most 120 characters"
            characters_fit = all(c.isascii() and (c.isalnum() or c in "._-") for c in self.name)
            starts_well = bool(self.name) and self.name[0] not in ".-"
            _require(characters_fit and starts_well and len(self.name) <= 120, "run.name", self.name, allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where images come from."""

    source: str
    """`digits` (embedded), a folder of class folders, Parquet in the Hugging Face image layout (a file, a folder, a pattern
    such as FOLDER/train-*.parquet), or packed shards (pipelines/pack.py). Parquet and shards also behind a URI:
    hf://datasets/OWNER/NAME, s3://bucket/prefix, gs://bucket/prefix, file:///; a server that speaks S3:
    s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http. Credentials come from the environment of every node."""

    num_images: int | None = None
    """Use only this many images, a fixed pseudo-random subset that is the same for every seed. None: all."""

    test_source: str | None = None
    """Labelled images for the final k-NN, whose classes are matched with those of the source by name. None: `test_fraction`
    of the source is held out for it."""

    test_fraction: float = 0.2
    """Share of the source held out from pretraining for the final k-NN where `test_source` is not given. 0: no
    evaluation then."""

    max_unreadable_fraction: float = 0.01
    """Share of unreadable images above which the run stops; judged after 1,000 images."""

    max_image_pixels: int = 100_000_000
    """Images with more pixels than this count as unreadable; checked on the header, before decoding (image bombs). Decoding
    takes about 7 bytes for each pixel for a moment, and about 12 if the image has more than 8 bits a channel."""

    intensity_range: tuple[float, float] | None = None
    """Values that become black and white in images with more than 8 bits a channel, in the images' own units (`0 4095` for 12
    bits, `-1024 3071` for computed tomography). Values between are scaled linearly, values outside are clipped, with the same
    range for every image. Images of up to 8 bits do not use it. None: images with more bits are refused, and a run that finds
    such images at its start stops and says which range they hold."""

    max_image_mib: int = 64
    """Encoded images of more MiB than this count as unreadable, and are not read."""

    shuffle_window_images: int = 65_536
    """Parquet and packed shards: blocks (row groups, record batches) are permuted, then samples inside windows of this many
    images. As many as there are images: one permutation of all."""

    shuffle_window_mib: int = 1024
    """Parquet: a window has at most so many MiB of images, on average. An image costs the reading of its row group, so the
    row groups of two windows should fit into `block_cache_mib`. Shards are read image by image and do not need it."""

    block_cache_mib: int = 4096
    """Disk of each node (below TMPDIR) for decompressed Parquet row groups, shared by its view workers; also for packed
    shards behind a URI that fit into it as a whole. Deleted by the last process that uses it."""

    max_row_group_mib: int = 1024
    """A Parquet row group with more MiB of images than this, decompressed, stops the run before it is read: it would not fit
    into the workers' memory (or is made to do so: small files can hold huge row groups)."""

    image_column: str = "image"
    """Parquet column with `struct<bytes, path>` (or plain binary)."""

    label_column: str = "label"
    """Parquet column with labels, used by evaluations only: integers (with the names of a `ClassLabel`), strings,
    categories, booleans, or floats without a fraction. May be missing: then there is no evaluation."""

    def __post_init__(self) -> None:
        _require(bool(self.source), "data.source", self.source, "a path, or `digits`")
        refuse_credentials("data.source", self.source)
        refuse_credentials("data.test_source", self.test_source)
        if self.num_images is not None:
            _require(self.num_images >= 1, "data.num_images", self.num_images, "1 or more")
        _require(0.0 <= self.test_fraction < 1.0, "data.test_fraction", self.test_fraction, "0 or more, below 1")
        _require_probability("data.max_unreadable_fraction", self.max_unreadable_fraction)
        _require(self.max_image_pixels >= 1, "data.max_image_pixels", self.max_image_pixels, "1 or more")
        if self.intensity_range is not None:
            black, white = self.intensity_range
            allowed = "two finite numbers, black below white"
            _require(-math.inf < black < white < math.inf, "data.intensity_range", self.intensity_range, allowed)
        _require(self.shuffle_window_images >= 1, "data.shuffle_window_images", self.shuffle_window_images, ">= 1")
        for name in ("max_image_mib", "shuffle_window_mib", "block_cache_mib", "max_row_group_mib"):
            _require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformConfig:
    """How one view is drawn. Probabilities are per view; views are drawn independently."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's area as a fraction of the image's (RandomResizedCrop; SimSiam: 0.2 to 1)."""

    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height, log-uniform (torchvision's default)."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling filter, antialiased."""

    flip_probability: float = 0.5
    """Horizontal flip."""

    jitter_probability: float = 0.8
    """Colour jitter: brightness, contrast, saturation and hue, in random order."""

    brightness: float = 0.4
    """Brightness factor from max(0, 1 - x) to 1 + x."""

    contrast: float = 0.4
    """Contrast factor from max(0, 1 - x) to 1 + x, about the mean grey of the crop."""

    saturation: float = 0.4
    """Saturation factor from max(0, 1 - x) to 1 + x."""

    hue_turns: float = 0.1
    """Hue shift from -x to x, in turns of the colour circle; 0 to 0.5."""

    grayscale_probability: float = 0.2
    """Conversion to grey."""

    blur_probability: float = 0.5
    """Gaussian blur. (The authors' SimSiam code blurs with 1 - p; see docs/reference_differences.md.)"""

    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    """Range of the standard deviation of the blur, in pixels of the rendered view."""

    blur_kernel_px: int = 9
    """Width of the blur's kernel, odd; SimSiam and DINO 9, SimCLR 23."""

    solarize_probability: float = 0.0
    """Inversion of values of 128 and above."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        _require(0.0 < low <= high <= 1.0, "crop_scale", self.crop_scale, "0 < min <= max <= 1")
        low, high = self.crop_ratio
        _require(1 / 7 <= low <= high <= 7, "crop_ratio", self.crop_ratio, "1/7 <= min <= max <= 7")
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            _require_probability(f"{name}_probability", getattr(self, f"{name}_probability"))
        for name in ("brightness", "contrast", "saturation"):
            _require(0.0 <= getattr(self, name) <= 10.0, name, getattr(self, name), "0 to 10")
        _require(0.0 <= self.hue_turns <= 0.5, "hue_turns", self.hue_turns, "0 to 0.5 turns")
        low, high = self.blur_sigma_px
        _require(0.0 < low <= high, "blur_sigma_px", self.blur_sigma_px, "0 < min <= max")
        _require(
            self.blur_kernel_px % 2 == 1 and self.blur_kernel_px >= 1, "blur_kernel_px", self.blur_kernel_px, "odd"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewGroupConfig:
    """Views of one resolution."""

    size_px: int
    """Height and width of a rendered view."""

    even: TransformConfig = dataclasses.field(default_factory=TransformConfig)
    """Transform of views 0, 2, 4, ..."""

    odd: TransformConfig | None = None
    """Transform of views 1, 3, 5, ...; None: the same as `even`. (DINO's two global transforms.)"""

    def __post_init__(self) -> None:
        _require(4 <= self.size_px <= 4096, "size_px", self.size_px, "4 to 4096")
        for transform in (self.even, self.odd or self.even):
            if transform.blur_probability > 0.0:
                fits = transform.blur_kernel_px // 2 < self.size_px
                allowed = f"the kernel's radius must be smaller than size_px={self.size_px}"
                _require(fits, "blur_kernel_px", transform.blur_kernel_px, allowed)

    def transform_of(self, view_index: int) -> TransformConfig:
        """Return the transform that draws view `view_index`."""
        return self.even if view_index % 2 == 0 or self.odd is None else self.odd


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """Block masks of global views, for masked image modelling (iBOT)."""

    patch_px: int
    """Height and width of a patch of the encoder; the mask has one cell per patch."""

    unmasked_probability: float = 0.5
    """A view stays unmasked with this probability. (iBOT: prediction ratios 0 and 0.3, one of them at random.)"""

    ratio: tuple[float, float] = (0.1, 0.5)
    """Share of the patches that are masked otherwise, uniform (iBOT: 0.3 with a variance of 0.2)."""

    block_ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Width / height of a block, log-uniform (iBOT, BEiT)."""

    def __post_init__(self) -> None:
        _require(self.patch_px >= 1, "views.masks.patch_px", self.patch_px, "1 or more")
        _require_probability("views.masks.unmasked_probability", self.unmasked_probability)
        low, high = self.ratio
        _require(0.0 <= low <= high <= 1.0, "views.masks.ratio", self.ratio, "0 <= min <= max <= 1")
        low, high = self.block_ratio
        _require(1 / 7 <= low <= high <= 7, "views.masks.block_ratio", self.block_ratio, "1/7 <= min <= max <= 7")

    def grid(self, size_px: int) -> int:
        """Return the number of cells along a side of a view."""
        return size_px // self.patch_px

    def max_cells(self, size_px: int) -> int:
        """Return how many cells of a view can be masked at most."""
        return int(self.ratio[1] * self.grid(size_px) ** 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig:
    """All views of an image, and how pixels become network inputs."""

    global_views: ViewGroupConfig
    """The views that pairs are made of."""

    local_views: ViewGroupConfig | None = None
    """Small multi-crop views (DINO, iBOT). None: there are none."""

    masks: MaskConfig | None = None
    """Masks of the global views (iBOT). None: there are none."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the channels, of values in [0, 1]; default ImageNet."""

    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the channels; default ImageNet."""

    evaluation_resize_px: int
    """Evaluation resizes the shorter side to this, then cuts the centre of `global_views.size_px` (ImageNet: 256)."""

    evaluation_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How evaluation resizes. The HVP authors: bilinear for SimSiam, bicubic for SimCLR, DINO and iBOT."""

    def __post_init__(self) -> None:
        fits = self.evaluation_resize_px >= self.global_views.size_px
        _require(fits, "views.evaluation_resize_px", self.evaluation_resize_px, "global_views.size_px or more")
        _require(min(self.std) > 0.0, "views.std", self.std, "positive")
        if self.masks is not None:
            size_px, patch_px = self.global_views.size_px, self.masks.patch_px
            allowed = f"a divisor of global_views.size_px={size_px} that leaves 2x2 patches or more"
            _require(size_px % patch_px == 0 and size_px >= 2 * patch_px, "views.masks.patch_px", patch_px, allowed)

    @property
    def slots_keep_transforms(self) -> bool:
        """Whether the two global slots have different transforms, so that pairs are (even view, odd view) only."""
        return self.global_views.odd is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """Which views are rendered, and which of them are trained on."""

    rule: Rule = "hardest"
    """hardest | first | random | easiest | min_iou | all_pairs; see `Rule`."""

    num_views: int | None = 4
    """Methods without local views (SimSiam, SimCLR): views rendered per image; the pair is chosen among
    num_views * (num_views - 1) / 2. (The paper: 4; 8 gave nothing more.) None with multi-crop."""

    num_global_views: int | None = None
    """Multi-crop (DINO, iBOT): global views rendered per image. None: `num_views` is used."""

    num_local_views: int | None = None
    """Multi-crop: local views rendered per image. None: there are none."""

    num_chosen_local_views: int | None = None
    """Multi-crop: local views trained on. None: there are none."""

    limit: int | None = None
    """Compare only so many randomly drawn candidates, the same for all images of a rank's step, as the authors' code
    does (64 or 128). None: the exact maximum over all candidates, which costs nothing more. Rules that compare no scores
    do not look at it."""

    every: int = 1
    """A hard step every k-th step; the others are vanilla steps, which render and ship only what they train on.
    With rule first all steps are vanilla."""

    score_always: bool = False
    """Score although the rule does not need it: the control "extra views seen only by BatchNorm"."""

    scoring_resolution_px: int | None = None
    """Global views are scored at this resolution, antialiased on the device; local views shrink by the same factor.
    None: at full resolution."""

    scoring_batch_norm: Literal["batch", "faithful", "running"] = "batch"
    """Statistics used while scoring. batch: of the batch, running statistics untouched. faithful: as automl/hvp, where
    scoring also moves the running statistics. running: the running statistics."""

    scoring_precision: Literal["training", "bfloat16"] = "training"
    """Precision of the networks while scoring. training: that of `training.precision`. bfloat16: autocast also where
    training is in float32; for GPUs, and CPUs that have instructions for it."""

    reuse_teacher: bool = True
    """DINO, iBOT: training takes the teacher's outputs of the chosen views from scoring, where they are the same: scored at
    full resolution in the precision of training, by a teacher without BatchNorm."""

    def __post_init__(self) -> None:
        if self.num_views is not None:
            _require(2 <= self.num_views <= 64, "selection.num_views", self.num_views, "2 to 64")
        if self.num_global_views is not None:
            _require(2 <= self.num_global_views <= 64, "selection.num_global_views", self.num_global_views, "2 to 64")
        known = (self.num_views is None) != (self.num_global_views is None)
        allowed = "None with selection.num_global_views (multi-crop), and a number without it"
        _require(known, "selection.num_views", self.num_views, allowed)
        local, chosen = self.num_local_views or 0, self.num_chosen_local_views or 0
        _require(0 <= local <= 256, "selection.num_local_views", self.num_local_views, "0 to 256, or None")
        needs_globals = local == 0 or self.num_global_views is not None
        _require(needs_globals, "selection.num_local_views", local, "None without selection.num_global_views")
        fits = (chosen == 0) == (local == 0) and 0 <= chosen <= local
        allowed = f"1 to selection.num_local_views={local}" if local else "None without local views"
        _require(fits, "selection.num_chosen_local_views", self.num_chosen_local_views, allowed)
        if self.limit is not None:
            _require(self.limit >= 1, "selection.limit", self.limit, "1 or more, or None for the exact maximum")
        _require(self.every >= 1, "selection.every", self.every, "1 or more")
        if self.scoring_resolution_px is not None:
            _require(
                self.scoring_resolution_px >= 4, "selection.scoring_resolution_px", self.scoring_resolution_px, ">= 4"
            )

    def is_hard_step(self, step: int) -> bool:
        """Tell whether step `step` follows `rule`; other steps are vanilla."""
        return self.rule != "first" and step % self.every == 0

    def num_views_at(self, step: int) -> int:
        """Return how many global views of each image step `step` renders."""
        if self.is_hard_step(step) or self.score_always:
            return self.num_candidate_views
        return 2

    def num_local_views_at(self, step: int) -> int:
        """Return how many local views of each image step `step` renders."""
        if self.is_hard_step(step) or self.score_always:
            return self.num_local_views or 0
        return self.num_chosen_local_views or 0

    @property
    def num_candidate_views(self) -> int:
        """Global views of a hard step: `num_global_views`, or `num_views` without multi-crop."""
        number = self.num_views if self.num_global_views is None else self.num_global_views
        assert number is not None
        return number


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """The encoder, from timm: a ResNet or a Vision Transformer."""

    name: str
    """timm's model name, for instance resnet50 or vit_small_patch16_224."""

    pretrained: bool = False
    """Start from timm's pretrained weights (fetched from the hub by timm)."""

    stem: Literal["imagenet", "cifar"] = "imagenet"
    """ResNets. cifar: 3x3 convolution of stride 1 and no max-pooling, for images of 16 to 64 px."""

    zero_init_residual: bool = True
    """ResNets: the last BatchNorm of each residual branch starts at 0 (SimSiam, SimCLR). False: at 1 (DINO)."""

    channels: tuple[int, ...] | None = None
    """ResNets: widths of the stages, for small experiments. None: those of the named model."""

    drop_path: float = 0.0
    """Stochastic depth of the trained encoder, rising linearly to this in the last block. A teacher has none."""

    patch_px: int | None = None
    """Vision Transformers: size of a patch. None: that of the named model."""

    image_px: int | None = None
    """Vision Transformers: resolution of the position embeddings' grid; they are interpolated for views of other
    sizes. None: that of the named model."""

    depth: int | None = None
    """Vision Transformers: number of blocks, for small experiments. None: that of the named model."""

    dim: int | None = None
    """Vision Transformers: width, for small experiments. None: that of the named model."""

    num_heads: int | None = None
    """Vision Transformers: attention heads, for small experiments. None: those of the named model."""

    def __post_init__(self) -> None:
        _require_probability("method.backbone.drop_path", self.drop_path)
        for name in ("patch_px", "image_px", "depth", "dim", "num_heads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"method.backbone.{name}", value, "1 or more, or None")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """What all methods have; a method's own config derives from it and names its implementation.

    `hvp_ray.methods.configs` has those of the package; docs/new_method.md shows another one.
    """

    name: ClassVar[str]
    """Name of the method, as logged."""

    implementation: ClassVar[str]
    """`module:class` of the `hvp_ray.methods.method.Method` that is built from this config."""

    uses_local_views: ClassVar[bool] = False
    """Whether the method is a multi-crop method."""

    uses_masks: ClassVar[bool] = False
    """Whether the method needs masks of the global views."""

    backbone: BackboneConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Optimizer and schedules; every schedule is a function of the step."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """sgd and adamw: torch's; lars: timm's, in one of two forms (`lars_norm`)."""

    learning_rate_per_256: float
    """Base learning rate for 256 images per step; the rate used is this x images_per_step / 256."""

    momentum: float = 0.9
    """sgd and lars; adamw has betas of 0.9 and 0.999."""

    weight_decay: float = 1e-4
    """At the start of the run."""

    final_weight_decay: float | None = None
    """At the end of the run, reached along a cosine by step (DINO). None: constant."""

    decay_exempts_vectors: bool = False
    """No weight decay, and no LARS adaptation, on biases and other one-dimensional parameters."""

    lars_trust_coefficient: float = 0.001
    """lars: the rate of a tensor is scaled by this x its norm / the norm of its gradient (`lars_norm`)."""

    lars_norm: Literal["decayed-gradient", "separate"] = "decayed-gradient"
    """lars: the divisor, with w the tensor, g its gradient and d the weight decay. decayed-gradient: |g + d w| (the HVP
    authors, MoCo v3). separate: |g| + d |w| (solo-learn, timm, apex)."""

    lars_clip: bool = False
    """lars: a tensor's scaled rate is at most the learning rate (LARC)."""

    schedule: Literal["cosine-per-epoch", "cosine-per-step"] = "cosine-per-epoch"
    """Cosine of the learning rate; SimSiam evaluates it once per epoch."""

    warmup_epochs: float = 0.0
    """Linear warm-up from 0 at the start, by step; the cosine spans the rest. A run that is shorter is all warm-up."""

    final_learning_rate: float = 0.0
    """The cosine ends here; not scaled with the images per step."""

    constant_predictor_rate: bool = True
    """Parameters that the method names (SimSiam's predictor) keep the initial learning rate (SimSiam, section 4.2)."""

    clip_gradient_norm: float | None = None
    """Largest norm of the gradient. None: no clipping (SimSiam)."""

    clip_scope: Literal["global", "tensor"] = "global"
    """global: one norm over all parameters. tensor: each parameter's own (DINO's and iBOT's published code)."""

    def __post_init__(self) -> None:
        path = "optimizer.learning_rate_per_256"
        _require(self.learning_rate_per_256 > 0.0, path, self.learning_rate_per_256, "positive")
        _require(0.0 <= self.momentum < 1.0, "optimizer.momentum", self.momentum, "0 or more, below 1")
        _require(self.weight_decay >= 0.0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        final_decay = self.final_weight_decay
        _require(final_decay is None or final_decay >= 0.0, "optimizer.final_weight_decay", final_decay, "0 or more")
        trust = self.lars_trust_coefficient
        _require(trust > 0.0, "optimizer.lars_trust_coefficient", trust, "positive")
        _require(self.warmup_epochs >= 0.0, "optimizer.warmup_epochs", self.warmup_epochs, "0 or more")
        _require(self.final_learning_rate >= 0.0, "optimizer.final_learning_rate", self.final_learning_rate, ">= 0")
        smooth = self.schedule == "cosine-per-step" or self.warmup_epochs == 0.0
        allowed = "0 with optimizer.schedule=cosine-per-epoch"
        _require(smooth, "optimizer.warmup_epochs", self.warmup_epochs, allowed)
        if self.clip_gradient_norm is not None:
            _require(self.clip_gradient_norm > 0.0, "optimizer.clip_gradient_norm", self.clip_gradient_norm, "positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How long, how much at once, in which precision."""

    epochs: int
    """Passes over the data; a last part smaller than one step is dropped."""

    num_steps: int | None = None
    """Train for exactly this many steps, whatever `epochs` says; the schedules span them. None: `epochs` decides."""

    images_per_step: int
    """Images per optimizer step over all trainers (the global batch)."""

    accumulation_steps: int = 1
    """A step is forwarded in this many parts of equal size, to save memory: their gradients add up to those of the
    whole step. BatchNorm sees one part at a time; SimCLR's loss still contrasts all images of the step, at the price of
    a second forward pass; scores contrast the images of one part."""

    checkpoint_every_steps: int = 500
    """Steps between checkpoints; one more is written at the end."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""

    torch_threads: int = 1
    """Threads of torch in each trainer on a CPU; part of the run's identity, because it changes summation order."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the forward passes; losses and weights stay float32."""

    compile: bool = False
    """torch.compile for scoring and training; GPUs only."""

    initial_weights: str | None = None
    """Backbone weights to start from: a run's folder or its backbone.safetensors, path or URI. None: random, or timm's
    where `method.backbone.pretrained` is set."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "training.epochs", self.epochs, "1 or more")
        if self.num_steps is not None:
            _require(self.num_steps >= 1, "training.num_steps", self.num_steps, "1 or more")
        _require(self.images_per_step >= 2, "training.images_per_step", self.images_per_step, "2 or more")
        parts = self.accumulation_steps
        _require(parts >= 1, "training.accumulation_steps", parts, "1 or more")
        every = self.checkpoint_every_steps
        _require(every >= 1, "training.checkpoint_every_steps", every, "1 or more")
        _require(self.keep_checkpoints >= 1, "training.keep_checkpoints", self.keep_checkpoints, "1 or more")
        _require(self.torch_threads >= 1, "training.torch_threads", self.torch_threads, "1 or more")
        refuse_credentials("training.initial_weights", self.initial_weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Who works where. Only `num_trainers`, `min_trainers`, `renderer` and `device` can change a bit of the result."""

    num_trainers: int = 1
    """Training processes; each takes images_per_step / num_trainers images of a step."""

    min_trainers: int | None = None
    """Elastic training: where nodes are lost, go on with as few trainers as this, and with more again when nodes come, up to
    num_trainers. The images of a step stay the same, but sums are added in another order, so two such runs are not equal
    to the bit. None: always num_trainers; a lost node is waited for."""

    resize_check_seconds: float = 60.0
    """How often an elastic run looks whether there is room for more trainers; they begin at the newest checkpoint."""

    placement: Literal["auto", "labels", "anywhere"] = "auto"
    """Nodes labelled by Ray resources `view` and `trainer` take so many view workers and trainers. auto: labels count where
    some node has them; labels: always, and nodes that do not exist yet are waited for; anywhere: never."""

    num_view_workers: int | Literal["auto"] = "auto"
    """Ray actors that render views. auto: the CPUs that the trainers leave, at least 1, at most 64."""

    renderer: RendererName | Literal["auto"] = "auto"
    """cpu | dali-cpu | dali-gpu. auto: cpu."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What trainers run on. auto: cuda where the cluster has enough GPUs for the trainers, else cpu."""

    batches_in_flight: int | Literal["auto"] = "auto"
    """Batches that each trainer asks for ahead of the step. A view worker works on one batch at a time: with fewer batches
    than view workers for each trainer, some idle. auto: two more than workers (and finishers) for each trainer, at least 4,
    as far as the object stores hold them."""

    cpus_per_trainer: float = 1.0
    """CPUs that Ray reserves for a trainer."""

    cpus_per_view_worker: float = 1.0
    """CPUs that Ray reserves for a view worker."""

    ship: Literal["views", "pixels"] = "views"
    """What crosses the link to the trainer's node. views: rendered views. pixels: each image decoded once, cut to what its
    views use; view finishers on the trainer's node render them, to the same bits. Fewer bytes where many views are drawn, or
    views are large beside their images (`pipelines/describe.py` counts both); renderer cpu only."""

    finishers_per_trainer: int = 1
    """View finishers beside each trainer with ship=pixels, of `cpus_per_view_worker` CPUs each, which Ray reserves together
    with the trainer's."""

    gpus_for_knn: float = 0.0
    """Share of a GPU that Ray reserves for the evaluation of `tracking.knn_every_epochs`. 0: it works on a CPU."""

    gpus_per_trainer: float | Literal["auto"] = "auto"
    """GPUs that Ray reserves for a trainer on cuda. A share below 1 also limits the share of the device's memory that its
    torch may take. auto: 1, or with renderer dali-gpu and no GPU to spare what the view workers leave of each."""

    gpus_per_dali_worker: float = 0.1
    """Share of a GPU that Ray reserves for a view worker with renderer dali-gpu. Ray counts shares, it does not enforce them;
    DALI has no limit of its own: its memory grows to what the largest batch needs and stays there."""

    object_store_mib: int | Literal["auto"] = "auto"
    """Object store of a Ray that we start ourselves. auto: three times the prefetched batches, at least 256 MiB, and less if
    this machine has less."""

    late_factor: float = 8.0
    """A batch that takes this many times the usual time (and more than `late_seconds`) is asked of another worker."""

    late_seconds: float = 30.0
    """See `late_factor`."""

    stall_seconds: float = 600.0
    """The run stops with an error when the next batch has not come for so long."""

    max_trainer_failures: int = 3
    """How often the trainers are started again after a failure of one of them."""

    def __post_init__(self) -> None:
        _require(self.num_trainers >= 1, "cluster.num_trainers", self.num_trainers, "1 or more")
        least, most = self.min_trainers, self.num_trainers
        allowed = f"None, or from 1 to cluster.num_trainers={most}"
        _require(least is None or 1 <= least <= most, "cluster.min_trainers", least, allowed)
        _require(self.resize_check_seconds > 0.0, "cluster.resize_check_seconds", self.resize_check_seconds, "positive")
        workers = self.num_view_workers
        _require(workers == "auto" or workers >= 1, "cluster.num_view_workers", workers, "auto, or 1 or more")
        ahead = self.batches_in_flight
        _require(ahead == "auto" or ahead >= 1, "cluster.batches_in_flight", ahead, "auto, or 1 or more")
        for name in (
            "cpus_per_trainer",
            "cpus_per_view_worker",
            "gpus_for_knn",
            "gpus_per_dali_worker",
            "late_seconds",
        ):
            _require(getattr(self, name) >= 0.0, f"cluster.{name}", getattr(self, name), "0 or more")
        finishers = self.finishers_per_trainer
        _require(finishers >= 1, "cluster.finishers_per_trainer", finishers, "1 or more")
        allowed = "views are shipped, and nothing is left to finish; set cluster.ship=pixels"
        _require(self.ship == "pixels" or finishers == 1, "cluster.finishers_per_trainer", finishers, allowed)
        if self.ship == "pixels" and self.renderer not in ("auto", "cpu"):
            raise ConfigError(
                f"cluster.ship=pixels with cluster.renderer={self.renderer!r} is not allowed: DALI decodes and renders in "
                f"one graph; choose renderer cpu, or ship views"
            )
        share, allowed = self.gpus_per_trainer, "auto, or above 0 and at most 1"
        _require(share == "auto" or 0.0 < share <= 1.0, "cluster.gpus_per_trainer", share, allowed)
        _require(self.late_factor >= 1.0, "cluster.late_factor", self.late_factor, "1 or more")
        _require(self.stall_seconds > 0.0, "cluster.stall_seconds", self.stall_seconds, "positive")
        _require(self.max_trainer_failures >= 0, "cluster.max_trainer_failures", self.max_trainer_failures, ">= 0")
        store = self.object_store_mib
        _require(store == "auto" or store >= 80, "cluster.object_store_mib", store, "auto, or 80 or more")

    @property
    def num_finishers(self) -> int:
        """View finishers beside each trainer; 0 where views are shipped."""
        return self.finishers_per_trainer if self.ship == "pixels" else 0

    @property
    def cpus_with_finishers(self) -> float:
        """CPUs that a trainer reserves: its own, and those of the view finishers beside it."""
        return self.cpus_per_trainer + self.num_finishers * self.cpus_per_view_worker


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """What is recorded, and where."""

    uri: str = "auto"
    """MLflow tracking URI. auto: the environment's MLFLOW_TRACKING_URI, else a SQLite file in `run.output`, no server needed;
    where that is a URI, in the folder that would be its default, on the machine of the first trainer: a cluster whose nodes
    come and go wants a server. none: no MLflow."""

    experiment: str = "hvp_ray"
    """MLflow experiment."""

    log_every_steps: int = 1
    """Steps between recorded values."""

    knn_neighbours: int = 20
    """Neighbours of the final k-NN with all labels (weighted vote, temperature 0.07)."""

    knn_images: int = 10_000
    """At most this many training images, and as many test images, take part in the final k-NN. 0: no k-NN."""

    knn_every_epochs: int = 0
    """Evaluate the encoder by k-NN every so many epochs while training goes on. 0: only at the end."""

    selection_images_per_epoch: int = 2_000
    """Of about so many images of an epoch, plan, scores and choice are written down, for pipelines/analyse_selection.py
    (rank 0's share; some 200 bytes an image). 0: of none."""

    comparison: str | None = None
    """Comparison that the run belongs to (set by pipelines/compare.py); a tag in MLflow."""

    arm: str | None = None
    """Arm of the comparison; a tag in MLflow."""

    num_figure_images: int = 6
    """Images shown in the figure of candidate views. 0: no figures."""

    def __post_init__(self) -> None:
        _require(bool(self.uri), "tracking.uri", self.uri, "auto, none, or an MLflow tracking URI")
        refuse_credentials("tracking.uri", self.uri)
        _require(self.log_every_steps >= 1, "tracking.log_every_steps", self.log_every_steps, "1 or more")
        _require(self.knn_neighbours >= 1, "tracking.knn_neighbours", self.knn_neighbours, "1 or more")
        _require(self.knn_images >= 0, "tracking.knn_images", self.knn_images, "0 or more")
        every, images = self.knn_every_epochs, self.selection_images_per_epoch
        _require(every >= 0, "tracking.knn_every_epochs", every, "0 or more")
        _require(images >= 0, "tracking.selection_images_per_epoch", images, "0 or more")
        _require(self.num_figure_images >= 0, "tracking.num_figure_images", self.num_figure_images, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
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
        self._check_images_per_step()
        self._check_views_of_method()
        scoring_px, size_px = self.selection.scoring_resolution_px, self.views.global_views.size_px
        if scoring_px is not None:
            allowed = f"at most views.global_views.size_px={size_px}"
            _require(scoring_px <= size_px, "selection.scoring_resolution_px", scoring_px, allowed)
        on_cpu = self.cluster.device == "cpu"
        compiles = self.training.compile
        _require(not (compiles and on_cpu), "training.compile", compiles, "False with cluster.device=cpu")

    def _check_images_per_step(self) -> None:
        images, parts, cluster = self.training.images_per_step, self.training.accumulation_steps, self.cluster
        for trainers in range(cluster.min_trainers or cluster.num_trainers, cluster.num_trainers + 1):
            allowed = f"a multiple of cluster.num_trainers={trainers}"
            if cluster.min_trainers is not None:
                numbers = f"cluster.min_trainers={cluster.min_trainers} to cluster.num_trainers={cluster.num_trainers}"
                allowed = f"a multiple of every number from {numbers}"
            _require(images % trainers == 0, "training.images_per_step", images, allowed)
            each = images // trainers
            allowed = f"a divisor of the {each} images of a trainer that leaves 2 or more"
            fits = each % parts == 0 and each // parts >= min(2, each)
            _require(fits, "training.accumulation_steps", parts, allowed)

    def _check_views_of_method(self) -> None:
        name, selection, views = self.method.name, self.selection, self.views
        if self.method.uses_local_views:
            allowed = f"None with {name}: set selection.num_global_views and selection.num_local_views"
            _require(selection.num_views is None, "selection.num_views", selection.num_views, allowed)
        else:
            allowed = f"None with {name}: set selection.num_views"
            number = selection.num_global_views
            _require(number is None, "selection.num_global_views", number, allowed)
        has_group, has_number = views.local_views is not None, bool(selection.num_local_views)
        allowed = "a number where views.local_views is set, None where it is not"
        _require(has_group == has_number, "selection.num_local_views", selection.num_local_views, allowed)
        has_masks = views.masks is not None
        allowed = f"set with {name}" if self.method.uses_masks else f"None with {name}, which has no masks"
        _require(has_masks == self.method.uses_masks, "views.masks", views.masks, allowed)

    @property
    def images_per_rank(self) -> int:
        """Images of one step on one trainer; the most that it can be where training is elastic."""
        return self.training.images_per_step // (self.cluster.min_trainers or self.cluster.num_trainers)


METHOD_TYPE = "type"
"""Key that says of which class a method's config is, as `module:class`."""


def config_to_dict(config: object) -> dict[str, Any]:
    """Return the config as nested plain values, ready for JSON."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"expected a config value, got {config!r}")
    values = dataclasses.asdict(config)
    if isinstance(config, RunConfig):
        kind = type(config.method)
        values["method"] = {METHOD_TYPE: f"{kind.__module__}:{kind.__qualname__}"} | values["method"]
    return values


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted names, in order."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def config_from_dict(nested: dict[str, Any]) -> RunConfig:
    """Rebuild the value that `config_to_dict` took apart.

    Raises:
        ConfigError: a field is missing, unknown or out of range.
    """
    if not isinstance(nested, dict):
        raise ConfigError(f"config.json does not describe a run, but has {str(nested)[:100]!r}")
    built = _build(RunConfig, nested, "")
    assert isinstance(built, RunConfig)
    return built


def _build(kind: type[Any], nested: dict[str, Any], path: str) -> object:
    if kind is MethodConfig:
        kind, nested = _method_type(nested), {key: value for key, value in nested.items() if key != METHOD_TYPE}
    hints = {field.name: field.type for field in dataclasses.fields(kind)}
    unknown = set(nested) - set(hints)
    if unknown:
        raise ConfigError(
            f"config.json has unknown fields {sorted(unknown)} in {path or 'the run'}; written by another version?"
        )
    values = {}
    for name, value in nested.items():
        hint = hints[name]
        candidates = [hint, *get_args(hint)]
        section = next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)
        if section is not None and isinstance(value, dict):
            values[name] = _build(section, value, f"{path}{name}.")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"config.json does not describe {kind.__name__} at {path or 'the run'}: {error}") from error


def _method_type(nested: dict[str, Any]) -> type[Any]:
    """Return the class of a method's config: a `MethodConfig` of the package or of anyone's own module."""
    module, _, name = str(nested.get(METHOD_TYPE, "")).partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"config.json names the method {module}:{name}, which cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, MethodConfig)):
        raise ConfigError(f"config.json names the method {module}:{name}, which is no MethodConfig")
    return kind
