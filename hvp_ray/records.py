r"""The records that travel between the stages, in the order of the data flow.

    EncodedBatch -> ViewPlan -> Views -> ViewBatch -> (trainer)
                           \-> BatchDraft + DecodedImages -> Views -> ViewBatch   (views rendered beside the trainer)

Legend of shapes, for the whole project:
    V views per image   B images on this rank   P unordered pairs = V(V-1)/2   S slots trained on (2: the pair)
    C channels          H, W pixels             D embedding                    R ranks
Order is view-major (VB...): flattening the first two axes gives the batch that the encoder sees.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvp_ray.errors import ShapeError


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Encoded images of the source, unchanged."""

    images: list[bytes]
    """B encoded images (JPEG, PNG, ...)."""

    sample_ids: NDArray[np.int64]
    """[B], stable over epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPlan:
    """Every random decision of V views of B images; all arrays are [V, B] unless said otherwise.

    A new augmentation takes a field here and three places: `views/plan.py` draws it, `views/render_cpu.py` and
    `views/color_batch.py` apply it. Its settings are in `config/views.py`. The selection log and its analysis list
    the fields by `per_view_types`.
    """

    top: NDArray[np.int32]
    """Upper edge of the crop, px of the original image."""
    left: NDArray[np.int32]
    """Left edge of the crop, px."""
    height: NDArray[np.int32]
    """Height of the crop, px."""
    width: NDArray[np.int32]
    """Width of the crop, px."""
    flip: NDArray[np.bool_]
    """Horizontal flip."""
    jitter: NDArray[np.bool_]
    """Whether colour jitter is applied; without it, the four factors below are neutral."""
    brightness: NDArray[np.float32]
    """Factor; 1 changes nothing."""
    contrast: NDArray[np.float32]
    """Factor; 1 changes nothing."""
    saturation: NDArray[np.float32]
    """Factor; 1 changes nothing."""
    hue_turns: NDArray[np.float32]
    """Shift of the hue, in turns; 0 changes nothing."""
    jitter_order: NDArray[np.uint8]
    """[V, B, 4]: order of the colour operations; 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    grayscale: NDArray[np.bool_]
    """Conversion to grey, after the jitter."""
    blur_sigma_px: NDArray[np.float32]
    """Standard deviation of the blur in px of the view; 0: no blur."""
    solarize: NDArray[np.bool_]
    """Inversion of values of 128 and above, after the blur."""
    mask: NDArray[np.bool_] | None = None
    """[V, B, rows, columns]: masked patches; None: the method has no masks. Renderers ignore it."""

    def __post_init__(self) -> None:
        shape = self.top.shape
        for name, array in self.arrays().items():
            if array.shape[:2] != shape or array.ndim != 2 + _FURTHER_AXES.get(name, 0):
                raise ShapeError(f"ViewPlan.{name} has shape {array.shape}, expected [V, B] = {shape}")

    @property
    def num_views(self) -> int:
        """V."""
        return int(self.top.shape[0])

    @property
    def num_images(self) -> int:
        """B."""
        return int(self.top.shape[1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, without a mask that is None."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: array for name, array in arrays.items() if array is not None}

    def view(self, view_index: int, image_index: int) -> dict[str, object]:
        """Return the decisions of one view as plain Python values."""
        return {name: array[view_index, image_index].tolist() for name, array in self.arrays().items()}

    def within(self, boxes: NDArray[np.int32]) -> "ViewPlan":
        """Return this plan for images cut to `boxes` [B, 4] (top, left, height, width in px)."""
        return dataclasses.replace(self, top=self.top - boxes[:, 0], left=self.left - boxes[:, 1])

    def with_images(self, image_indices: NDArray[np.int64], other: "ViewPlan") -> "ViewPlan":
        """Return this plan with the columns `image_indices` replaced by those of `other` [V, len(image_indices)]."""
        arrays = {name: array.copy() for name, array in self.arrays().items()}
        for name, array in arrays.items():
            array[:, image_indices] = getattr(other, name)
        return ViewPlan(**arrays)

    def gather(self, view_indices: NDArray[np.int64]) -> "ViewPlan":
        """Return the plan of the views `view_indices` [S, B] of each image."""
        images = np.arange(self.num_images)
        return ViewPlan(**{name: array[view_indices, images] for name, array in self.arrays().items()})

    @staticmethod
    def of_views(plans: "list[ViewPlan]") -> "ViewPlan":
        """Return one plan of the views of several plans for the same images."""
        parts = [plan.arrays() for plan in plans]
        return ViewPlan(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


_FURTHER_AXES = {"jitter_order": 1, "mask": 2}
"""Axes after [V, B] of the fields of `ViewPlan` that are not one value for each view."""


def per_view_types() -> dict[str, np.dtype[Any]]:
    """Return the type of every field of `ViewPlan` with one value for each view, by name and in order."""
    hints = typing.get_type_hints(ViewPlan)
    names = [field.name for field in dataclasses.fields(ViewPlan) if field.name not in _FURTHER_AXES]
    # NDArray[T] is ndarray[shape, dtype[T]].
    return {name: np.dtype(typing.get_args(typing.get_args(hints[name])[1])[0]) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """Rendered views of one resolution, and their plan."""

    pixels: NDArray[np.uint8]
    """[V, B, S, S, C], HWC, contiguous."""
    plan: ViewPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Replacement:
    """An unreadable image of a step, and the image that replaces it."""

    index: int
    """Index in the rank's batch."""
    unreadable_id: int
    replacement_id: int
    reason: str
    place: str = ""
    """Location of the unreadable image, from `Source.describe`; empty in journals of older versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedImages:
    """Decoded images of one batch, each cut to the box that its views use, concatenated in one array."""

    pixels: NDArray[np.uint8]
    """[sum of height * width * C]: the boxes, each HWC."""
    boxes: NDArray[np.int32]
    """[B, 4]: top, left, height, width in px of the original image."""
    channels: int
    """C."""
    failures: dict[int, str]
    """Index in the batch -> why the image cannot be decoded; its box holds zeros."""

    def images(self) -> list[NDArray[np.uint8]]:
        """Return the pixels of each box, [height, width, C], without a copy."""
        shapes = [(height, width, self.channels) for height, width in self.boxes[:, 2:].tolist()]
        ends = np.cumsum([height * width * channels for height, width, channels in shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(self.pixels, ends), shapes, strict=True)]

    def with_images(self, image_indices: NDArray[np.int64], other: "DecodedImages") -> "DecodedImages":
        """Return these with the images at `image_indices` replaced by those of `other`, and the failures of `other`."""
        boxes, images = self.boxes.copy(), self.images()
        boxes[image_indices] = other.boxes
        for index, image in zip(image_indices.tolist(), other.images(), strict=True):
            images[index] = image
        failures = {int(image_indices[place]): reason for place, reason in other.failures.items()}
        return DecodedImages(
            pixels=np.concatenate([i.ravel() for i in images]), boxes=boxes, channels=self.channels, failures=failures
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchFacts:
    """The facts about one rank's batch of one step that do not depend on how far it is rendered."""

    step: int
    epoch: int
    sample_ids: NDArray[np.int64]
    """[B], after replacement of unreadable images."""
    heights: NDArray[np.int32]
    """[B], px of the original images."""
    widths: NDArray[np.int32]
    """[B], px of the original images."""
    replacements: tuple[Replacement, ...]
    render_cpu_seconds: float
    """CPU time of reading, decoding and rendering so far, in all processes involved."""
    render_seconds: float
    """Wall time of reading, decoding and rendering so far."""
    worker: str
    """Name of the view worker."""
    crashing_ids: tuple[int, ...] = ()
    """Images newly found to crash a decoder's process; empty if this request did not search for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchDraft(BatchFacts):
    """A batch before its views are rendered: its plans, without pixels."""

    global_plan: ViewPlan
    local_plan: ViewPlan | None
    probes: "tuple[BatchDraft, DecodedImages] | None" = None
    """The probe views of the step; None: it has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewBatch(BatchFacts):
    """The rendered views of one rank's batch of one step."""

    global_views: Views
    local_views: Views | None
    probe_views: Views | None = None
    """Views of the first images that are only scored, for rule predicted to learn from; None: there are none."""
    decoded_bytes: int = 0
    """Bytes of decoded pixels that were shipped instead of views; 0: the views were shipped."""
    finish_seconds: float = 0.0
    """Part of `render_seconds` that a view finisher took."""

    @property
    def groups(self) -> dict[str, Views]:
        """The groups of views that there are, by name: global, local, probe."""
        groups = {"global": self.global_views, "local": self.local_views, "probe": self.probe_views}
        return {name: views for name, views in groups.items() if views is not None}

    @property
    def num_rendered_views(self) -> int:
        """Views of all images, of all groups."""
        return sum(views.plan.num_views * views.plan.num_images for views in self.groups.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the views' pixels."""
        return sum(views.pixels.nbytes for views in self.groups.values())

    @property
    def shipped_bytes(self) -> int:
        """Bytes of pixels that the view worker sent."""
        return self.decoded_bytes or self.num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """How two views of each image are chosen among many plans, by predicted hardness, before anything is rendered."""

    num_plans: int
    """Plans drawn for each image."""
    coefficients: NDArray[np.float64]
    """[F]: of `selection.proposals.FEATURES`."""
    quantile: float
    """Place among the pairs of an image ordered by predicted hardness: 1 is the hardest, 0 the easiest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRequest:
    """The address of one rank's batch of one step: everything that a worker needs besides its configuration."""

    step: int
    epoch: int
    first_position: int
    """Position of the first image in the epoch's order."""
    sample_ids: NDArray[np.int64]
    """[B]."""
    num_views: int
    """Global views of each image."""
    num_local_views: int = 0
    proposal: Proposal | None = None
    """How the global views are chosen; None: they are the first plans."""
    num_probe_images: int = 0
    """Number of images, from the first, that also have probe views."""
    num_probe_views: int = 0
    """Probe views of each of them: the first plans."""
    known_replacements: tuple[Replacement, ...] = ()
    """Decisions of an earlier attempt at this step on unreadable images; they are replayed."""
    quarantined_ids: tuple[int, ...] = ()
    """Images that crash a decoder's process; they are never decoded."""
    search_crashing: bool = False
    """Whether to search for such images before decoding any in the worker's own process."""
