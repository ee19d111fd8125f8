"""The DALI renderer: the same two graphs for device cpu and gpu, driven by the plan as per-sample arguments.

The first graph decodes each image once; the second renders all views of a group as one batch of V x B samples that share
the decoded images, so that a graph is gone through once for a group and not once for a view. Same meaning and order of
operations as `render_cpu`; colour is computed in float32 with a clamp after each operation and rounded once. The crop is
sliced first and then resized: `resize(roi_*)` would read outside the crop.

Only upright, complete JPEGs are decoded by DALI. Everything else is decoded on the host by `data.decode` and handed
over as a bitmap, so that odd images have the same pixels with every renderer, and one bad image never costs a batch.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from hvp_ray.config import RendererName, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb, is_plain_jpeg, read_size
from hvp_ray.errors import ConfigError, UnreadableImageError
from hvp_ray.records import ViewPlan
from hvp_ray.views import color
from hvp_ray.views.renderer import RenderedBatch

try:
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.pipeline import OperatorConcurrency, StreamPolicy
except ImportError as error:  # pragma: no cover (the package is a dependency on Linux)
    raise ConfigError(
        f"cluster.renderer=dali-* needs the package nvidia-dali-cuda130, which cannot be imported here ({error}); "
        f"install it, or choose cluster.renderer=cpu"
    ) from error

logger = logging.getLogger(__name__)

_ARGUMENTS = (
    "start",
    "shape",
    "is_jitter",
    "order",
    "brightness",
    "contrast",
    "saturation_matrix",
    "hue",
    "is_grey",
    "is_blur",
    "sigma",
    "is_solarize",
    "flip",
)
_WEIGHTS = np.array(color.GREY_WEIGHTS, dtype=np.float32)
_GREY_MATRIX = [float(weight) for _ in range(3) for weight in color.GREY_WEIGHTS]
_TAIL_BYTES = 65_536
_END_OF_JPEG = b"\xff\xd9"


@dataclass(frozen=True, kw_only=True, slots=True)
class DaliExecution:
    """How DALI does its work; no pixel depends on it but those that the hardware's JPEG decoder decodes."""

    num_threads: int = 1
    """Host threads: of all operations on a CPU; on a GPU of the host's part of decoding."""
    hw_decoder_load: float = 0.65
    """On a GPU: share of the JPEGs that its hardware decoder takes, where it has one. 0: kernels decode all."""
    concurrency: OperatorConcurrency | None = None
    """Which operations of a graph may run side by side. None: DALI's default."""
    stream_policy: StreamPolicy | None = None
    """Which operations share a CUDA stream. None: DALI's default."""
    shares_images: bool = True
    """The second graph works on the decoded images where they are, without a copy for each view."""


class DaliRenderer:
    """Renders with NVIDIA DALI; see `Renderer`. Graphs are built for the largest batch so far and kept."""

    def __init__(
        self,
        views: ViewsConfig,
        *,
        name: RendererName,
        max_image_pixels: int,
        device_id: int = 0,
        execution: DaliExecution | None = None,
    ) -> None:
        self.name: RendererName = name
        self._views = views
        self._max_image_pixels = max_image_pixels
        self._execution = execution or DaliExecution()
        self._device_id = device_id if name == "dali-gpu" else None
        self._graphs: dict[Hashable, _Graph] = {}

    def render(
        self, images: Sequence[bytes], global_plan: ViewPlan, local_plan: ViewPlan | None = None
    ) -> RenderedBatch:
        """Render the batch; a batch that DALI refuses is looked through image by image and rendered again."""
        encoded: list[NDArray[np.uint8]] = []
        failures: dict[int, str] = {}
        for index, image in enumerate(images):
            try:
                encoded.append(self._prepare(image, on_host=False))
            except UnreadableImageError as error:
                failures[index] = str(error)
                encoded.append(_bitmap(np.zeros((1, 1, 3), np.uint8)))
        try:
            outputs = self._run(encoded, global_plan, local_plan, failures)
        except RuntimeError as error:
            logger.warning("DALI refused a batch (%s); decoding it on the host", str(error).splitlines()[0])
            self._graphs.clear()  # a graph that has raised cannot go on
            for index, image in enumerate(images):
                if index not in failures:
                    try:
                        encoded[index] = self._prepare(image, on_host=True)
                    except UnreadableImageError as unreadable:
                        failures[index] = str(unreadable)
                        encoded[index] = _bitmap(np.zeros((1, 1, 3), np.uint8))
            outputs = self._run(encoded, global_plan, local_plan, failures)
        return RenderedBatch(
            global_pixels=outputs[0], local_pixels=outputs[1] if len(outputs) > 1 else None, failures=failures
        )

    def _prepare(self, image: bytes, *, on_host: bool) -> NDArray[np.uint8]:
        """Return what DALI shall decode: the JPEG itself, or a bitmap of an odd image."""
        if not on_host and is_plain_jpeg(image) and _END_OF_JPEG in image[-_TAIL_BYTES:]:
            read_size(image, max_pixels=self._max_image_pixels)  # DALI would decode whatever the header says
            return np.frombuffer(image, dtype=np.uint8)
        return _bitmap(decode_rgb(image, max_pixels=self._max_image_pixels))

    def _run(
        self,
        encoded: list[NDArray[np.uint8]],
        global_plan: ViewPlan,
        local_plan: ViewPlan | None,
        failures: dict[int, str],
    ) -> list[NDArray[np.uint8]]:
        decoded = self.decode(encoded)
        outputs = [self.render_decoded(decoded, global_plan, self._views.global_views, failures)]
        if local_plan is not None:
            assert self._views.local_views is not None
            outputs.append(self.render_decoded(decoded, local_plan, self._views.local_views, failures))
        return outputs

    def decode(self, encoded: list[NDArray[np.uint8]]) -> list[Any]:
        """Return the decoded images [H, W, 3] as DALI tensors on the device; they are gone with the next decode."""
        graph = self._graph("decode", len(encoded), lambda: _define_decode(self._execution, on_gpu=self._on_gpu))
        (decoded,) = graph.run({"images": encoded})
        return list(decoded)

    def render_decoded(
        self, decoded: list[Any], plan: ViewPlan, group: ViewGroupConfig, failures: dict[int, str] | None = None
    ) -> NDArray[np.uint8]:
        """Render all views of a group, [V, B, S, S, 3], of what `decode` returned; failed images are zeros."""
        host = _HostPixels((plan.num_views, len(decoded), group.size_px, group.size_px, 3), pinned=self._on_gpu)
        for kind in _kinds_of_views(group, plan.num_views):
            samples = len(kind.view_indices) * len(decoded)
            # Smaller transforms are a graph of their own, because the two are constants of a graph.
            key = (group.size_px, kind.interpolation, kind.blur_kernel_px, len(kind.view_indices))
            graph = self._graph(key, samples, partial(self._define_views, group.size_px, kind))
            inputs = _arguments(plan, kind.view_indices, failures or {})
            (rendered,) = graph.run({"images": decoded * len(kind.view_indices), **inputs})
            host.take(kind.view_indices, rendered)
        pixels = host.wait()
        pixels[:, list(failures or {})] = 0
        return pixels

    def _define_views(self, size_px: int, kind: "_KindOfViews") -> Any:
        return _define_views(size_px, kind, self._execution, on_gpu=self._on_gpu)

    @property
    def _on_gpu(self) -> bool:
        return self._device_id is not None

    def _graph(self, key: Hashable, num_samples: int, define: Callable[[], Any]) -> "_Graph":
        graph = self._graphs.get(key)
        if graph is None or num_samples > graph.max_samples:
            pipeline = define()(
                batch_size=num_samples,
                num_threads=self._execution.num_threads,
                device_id=self._device_id,
                prefetch_queue_depth=1,
                exec_dynamic=True,
                concurrency=self._execution.concurrency,
                stream_policy=self._execution.stream_policy,
            )
            pipeline.build()
            graph = self._graphs[key] = _Graph(pipeline, num_samples)
        return graph


@dataclass(frozen=True, slots=True)
class _Graph:
    pipeline: Any
    max_samples: int

    def run(self, inputs: dict[str, Any]) -> Any:
        for name, values in inputs.items():
            self.pipeline.feed_input(name, values)
        return self.pipeline.run()


@dataclass(frozen=True, kw_only=True, slots=True)
class _KindOfViews:
    """Views of a group that one graph can render."""

    interpolation: str
    blur_kernel_px: int
    view_indices: list[int]


def _kinds_of_views(group: ViewGroupConfig, num_views: int) -> list[_KindOfViews]:
    """Return the views by what is a constant of a graph; for all recipes that is one kind for each group."""
    kinds: dict[tuple[str, int], list[int]] = {}
    for view_index in range(num_views):
        transform = group.transform_of(view_index)
        kinds.setdefault((transform.interpolation, transform.blur_kernel_px), []).append(view_index)
    return [
        _KindOfViews(interpolation=interpolation, blur_kernel_px=kernel_px, view_indices=indices)
        for (interpolation, kernel_px), indices in kinds.items()
    ]


class _HostPixels:
    """The pixels of a group on the host. From a GPU they come by one copy into pinned memory.

    torch keeps pinned memory that nobody holds any more and gives it out again, so nothing is pinned anew for each batch.
    """

    def __init__(self, shape: tuple[int, ...], *, pinned: bool) -> None:
        self._pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self._pinned = pinned

    def take(self, view_indices: list[int], rendered: Any) -> None:
        """Copy the views of one kind, [len(view_indices) x B, S, S, 3]; from a GPU without waiting."""
        if not self._pinned:
            views = rendered.as_array().reshape(len(view_indices), *self._pixels.shape[1:])
            self._pixels.numpy()[view_indices] = views
            return
        on_device = from_dlpack(rendered.as_tensor()).view(len(view_indices), *self._pixels.shape[1:])
        if len(view_indices) == len(self._pixels):
            self._pixels.copy_(on_device, non_blocking=True)
            return
        for place, view_index in enumerate(view_indices):
            self._pixels[view_index].copy_(on_device[place], non_blocking=True)

    def wait(self) -> NDArray[np.uint8]:
        """Return [V, B, S, S, 3] when all copies have ended."""
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        pixels: NDArray[np.uint8] = self._pixels.numpy()
        return pixels


def _define_decode(execution: DaliExecution, *, on_gpu: bool) -> Any:
    """Return the pipeline function that decodes."""

    @pipeline_def
    def graph() -> Any:
        encoded = fn.external_source(name="images", device="cpu")
        options = {"device": "mixed", "hw_decoder_load": execution.hw_decoder_load} if on_gpu else {"device": "cpu"}
        return fn.decoders.image(encoded, output_type=types.RGB, **options)

    return graph


def _define_views(size_px: int, kind: _KindOfViews, execution: DaliExecution, *, on_gpu: bool) -> Any:
    """Return the pipeline function that renders views of one kind from decoded images."""

    @pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        device = "gpu" if on_gpu else "cpu"
        image = fn.external_source(name="images", device=device, layout="HWC", no_copy=execution.shares_images)
        arguments = {name: fn.external_source(name=name, device="cpu") for name in _ARGUMENTS}
        crop = fn.slice(image, start=arguments["start"], shape=arguments["shape"], axes=(0, 1))
        interpolation = types.INTERP_LINEAR if kind.interpolation == "bilinear" else types.INTERP_CUBIC
        view = fn.resize(crop, size=(size_px, size_px), interp_type=interpolation, antialias=True, dtype=types.UINT8)
        view = _recolour(view, arguments)
        view = _blur_and_solarize(view, arguments, kind.blur_kernel_px)
        return fn.flip(view, horizontal=arguments["flip"])

    return graph


def _recolour(view: Any, arguments: dict[str, Any]) -> Any:
    if arguments["is_jitter"]:
        levels = fn.cast(view, dtype=types.FLOAT)
        for place in range(4):
            levels = _jitter_once(levels, arguments["order"][place], arguments)
    else:
        levels = fn.cast(view, dtype=types.FLOAT)
    if arguments["is_grey"]:
        levels = fn.coord_transform(levels, M=_GREY_MATRIX)
    return fn.cast(fn.coord_transform(levels, MT=[1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 1.0, 0]), dtype=types.UINT8)


def _jitter_once(levels: Any, operation: Any, arguments: dict[str, Any]) -> Any:
    if operation == color.BRIGHTNESS:
        out = math.clamp(levels * arguments["brightness"], 0.0, color.LEVEL_MAX)
    elif operation == color.CONTRAST:
        mean = fn.reductions.sum(fn.reductions.mean(levels, axes=(0, 1)) * types.Constant(_WEIGHTS))
        factor = arguments["contrast"]
        out = math.clamp(levels * factor + mean * (1.0 - factor), 0.0, color.LEVEL_MAX)
    elif operation == color.SATURATION:
        blended = fn.coord_transform(levels, M=arguments["saturation_matrix"])
        out = math.clamp(blended, 0.0, color.LEVEL_MAX)
    else:
        out = math.clamp(_shift_hue(levels, arguments["hue"]), 0.0, color.LEVEL_MAX)
    return out


def _shift_hue(levels: Any, turns: Any) -> Any:
    """Shift the hue in HSV, in sextants: channel(n) = v - c x clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6."""
    red, green, blue = (levels[:, :, channel : channel + 1] for channel in range(3))
    value = math.max(math.max(red, green), blue)
    chroma = value - math.min(math.min(red, green), blue)
    divisor = math.max(chroma, 1e-6)
    is_red = fn.cast(red == value, dtype=types.FLOAT)
    is_green = fn.cast(green == value, dtype=types.FLOAT) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    hue = (
        is_red * (green - blue) / divisor
        + is_green * (2.0 + (blue - red) / divisor)
        + is_blue * (4.0 + (red - green) / divisor)
    )
    hue = hue + 6.0 * turns
    channels = []
    for sextant in (5.0, 3.0, 1.0):
        k = hue + sextant
        k = k - 6.0 * math.floor(k / 6.0)
        channels.append(value - chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0))
    return fn.cat(*channels, axis=2)


def _blur_and_solarize(view: Any, arguments: dict[str, Any], kernel_px: int) -> Any:
    if arguments["is_blur"]:
        view = fn.gaussian_blur(view, sigma=arguments["sigma"], window_size=kernel_px)
    if arguments["is_solarize"]:
        is_bright = fn.cast(view >= 128, dtype=types.UINT8)
        view = fn.cast(is_bright * (255 - view) + (1 - is_bright) * view, dtype=types.UINT8)
    return view


def _arguments(plan: ViewPlan, view_indices: list[int], failures: dict[int, str]) -> dict[str, Any]:
    """Return the per-sample arguments of some views, [len(view_indices) x B, ...], view-major.

    Failed images are placeholders of one pixel.
    """

    def of_samples(values: NDArray[Any], dtype: type | None = None) -> NDArray[Any]:
        chosen = values[view_indices]
        return np.ascontiguousarray(chosen.reshape(-1, *chosen.shape[2:]), dtype=dtype)

    start = np.stack([plan.top, plan.left], axis=-1)
    shape = np.stack([plan.height, plan.width], axis=-1)
    start[:, list(failures)] = 0
    shape[:, list(failures)] = 1
    saturation = plan.saturation[..., None, None]
    matrix = saturation * np.eye(3, dtype=np.float32) + (1.0 - saturation) * _WEIGHTS[None, None, None, :]
    is_blur = plan.blur_sigma_px > 0.0
    return {
        "start": of_samples(start, np.int32),
        "shape": of_samples(shape, np.int32),
        "is_jitter": of_samples(plan.jitter),
        "order": of_samples(plan.jitter_order, np.int32),
        "brightness": of_samples(plan.brightness),
        "contrast": of_samples(plan.contrast),
        "saturation_matrix": of_samples(matrix, np.float32),
        "hue": of_samples(plan.hue_turns % 1.0, np.float32),
        "is_grey": of_samples(plan.grayscale),
        "is_blur": of_samples(is_blur),
        "sigma": of_samples(np.where(is_blur, plan.blur_sigma_px, 1.0), np.float32),
        "is_solarize": of_samples(plan.solarize),
        "flip": of_samples(plan.flip, np.int32),
    }


def _bitmap(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    encoded: NDArray[np.uint8] = cv2.imencode(".bmp", np.ascontiguousarray(pixels[:, :, ::-1]))[1]
    return encoded.reshape(-1)
