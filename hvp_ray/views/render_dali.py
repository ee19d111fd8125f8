"""The DALI renderer: two graphs for device cpu and gpu, with the plan as per-sample arguments.

The first graph decodes each image once. The second renders all views of a group as one batch of V x B samples that share
the decoded images, so a graph runs once for a group instead of once for a view. Operations have the meaning and order of
`render_cpu`; colour is computed in float32 with a clamp after each operation and rounded once. The crop is sliced before it
is resized, because `resize(roi_*)` would read outside the crop.

DALI decodes only upright, complete JPEGs. `data.decode` decodes all others on the host and passes them as bitmaps. So odd
images have equal pixels with every renderer, and one bad image never costs a batch.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from hvp_ray.config import DataConfig, RendererName, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb, is_plain_jpeg, read_size
from hvp_ray.errors import ConfigError, UnreadableImageError
from hvp_ray.records import ViewPlan
from hvp_ray.views import color
from hvp_ray.views.blur_kernel import gaussian_kernel
from hvp_ray.views.renderer import RenderedBatch

try:
    from nvidia.dali import fn, math, pipeline_def, types
except ImportError as error:  # pragma: no cover (the package is an extra)
    raise ConfigError(
        f"cluster.renderer=dali-* needs the package nvidia-dali-cuda130, which cannot be imported here ({error}): "
        f"pip install 'hvp-ray[dali]', or choose cluster.renderer=cpu"
    ) from error

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

_WEIGHTS = np.array(color.GREY_WEIGHTS, dtype=np.float32)
_GREY_MATRIX = [float(weight) for _ in range(3) for weight in color.GREY_WEIGHTS]
_TAIL_BYTES = 65_536
_END_OF_JPEG = b"\xff\xd9"


@dataclass(frozen=True, kw_only=True, slots=True)
class DaliExecution:
    """Settings of DALI's execution; only `hw_decoder_load` changes pixels."""

    num_lanes: int = 1
    """Parts of a batch that run in parallel, each with its own graphs and host thread: while one uses the device, another
    unpacks JPEGs or prepares launches."""
    num_threads: int = 1
    """Host threads of a lane. On a CPU they run all operations, on a GPU the host's part of decoding."""
    hw_decoder_load: float = 1.0
    """On a GPU with a hardware decoder: fraction of a batch's JPEGs that it decodes. Between 0 and 1 an image's pixels would
    depend on its place in the batch, because hardware and kernels round differently."""


ON_A_CPU = DaliExecution()
ON_A_GPU = DaliExecution(num_lanes=4, num_threads=2)
"""The fastest setting measured on an H100 (docs/experiments/2026-11-26-h100.md)."""


class DaliRenderer:
    """Renders with NVIDIA DALI; see `Renderer`. It keeps graphs for the largest batch so far."""

    def __init__(
        self,
        views: ViewsConfig,
        data: DataConfig,
        *,
        name: RendererName,
        device_id: int | None = None,
        execution: DaliExecution | None = None,
    ) -> None:
        self.name: RendererName = name
        self._views = views
        self._data = data
        self._on_gpu = name == "dali-gpu"
        if self._on_gpu and device_id is None:
            device_id = torch.cuda.current_device()  # a trainer that renders inline may use any device
        self._execution = execution or (ON_A_GPU if self._on_gpu else ON_A_CPU)
        self._lanes = [
            _Lane(self._execution, device_id if self._on_gpu else None) for _ in range(self._execution.num_lanes)
        ]
        self._host_threads = ThreadPoolExecutor(len(self._lanes), thread_name_prefix="dali")

    def render(
        self, images: Sequence[bytes], global_plan: ViewPlan, local_plan: ViewPlan | None = None
    ) -> RenderedBatch:
        """Render the batch; if DALI rejects it, decode every image on the host and render again."""
        encoded, failures = self._prepare(images, on_host=False)
        try:
            outputs = self._run(encoded, global_plan, local_plan, failures)
        except RuntimeError as error:
            logger.warning("DALI rejected a batch (%s); decoding it on the host", str(error).splitlines()[0])
            for lane in self._lanes:
                lane.graphs.clear()  # a graph that raised cannot run again
            encoded, failures = self._prepare(images, on_host=True)
            outputs = self._run(encoded, global_plan, local_plan, failures)
        return RenderedBatch(
            global_pixels=outputs[0], local_pixels=outputs[1] if len(outputs) > 1 else None, failures=failures
        )

    def _prepare(self, images: Sequence[bytes], *, on_host: bool) -> tuple[list[NDArray[np.uint8]], dict[int, str]]:
        """Return the input of DALI's decoder, and index -> reason of unreadable images, which become one black pixel.

        Plain JPEGs are passed unchanged, unless `on_host`. Other images are passed as bitmaps.
        """
        encoded: list[NDArray[np.uint8]] = []
        failures: dict[int, str] = {}
        limit, intensity_range = self._data.max_image_pixels, self._data.intensity_range
        for index, image in enumerate(images):
            try:
                if not on_host and is_plain_jpeg(image) and _END_OF_JPEG in image[-_TAIL_BYTES:]:
                    read_size(image, max_pixels=limit)  # DALI has no size limit
                    encoded.append(np.frombuffer(image, dtype=np.uint8))
                else:
                    encoded.append(_bitmap(decode_rgb(image, max_pixels=limit, intensity_range=intensity_range)))
            except UnreadableImageError as error:
                failures[index] = str(error)
                encoded.append(_bitmap(np.zeros((1, 1, 3), np.uint8)))
        return encoded, failures

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
        """Return the decoded images [H, W, 3] as DALI tensors on the device."""
        parts = self._in_lanes(len(encoded), lambda lane, images: lane.decode(encoded[images]))
        return [image for part in parts for image in part]

    def render_decoded(
        self, decoded: list[Any], plan: ViewPlan, group: ViewGroupConfig, failures: dict[int, str] | None = None
    ) -> NDArray[np.uint8]:
        """Render all views of a group, [V, B, S, S, 3], from the result of `decode`; failed images are zeros."""
        host = _HostPixels((plan.num_views, len(decoded), group.size_px, group.size_px, 3), pinned=self._on_gpu)
        arguments = _arguments(plan, group, failures or {})

        def render(lane: "_Lane", images: slice) -> None:
            lane.render(
                decoded[images], {name: of_all[:, images] for name, of_all in arguments.items()}, group, images, host
            )

        self._in_lanes(len(decoded), render)
        pixels = host.wait()
        pixels[:, list(failures or {})] = 0
        return pixels

    def _in_lanes(self, num_images: int, work: "Callable[[_Lane, slice], _T]") -> list[_T]:
        """Run a part of the batch in each lane; return the results in the order of the images."""
        num_lanes = min(len(self._lanes), num_images)
        bounds = [num_images * lane // num_lanes for lane in range(num_lanes + 1)]
        parts = [slice(start, end) for start, end in pairwise(bounds)]
        if num_lanes == 1:
            return [work(self._lanes[0], parts[0])]
        futures = [self._host_threads.submit(work, lane, part) for lane, part in zip(self._lanes, parts, strict=False)]
        wait(futures)
        return [future.result() for future in futures]


class _Lane:
    """The graphs of one host thread, kept for the largest batch so far."""

    def __init__(self, execution: DaliExecution, device_id: int | None) -> None:
        self._execution = execution
        self._device_id = device_id
        self.graphs: dict[Hashable, _Graph] = {}

    def decode(self, encoded: list[NDArray[np.uint8]]) -> list[Any]:
        """See `DaliRenderer.decode`."""
        graph = self._graph("decode", len(encoded), lambda: _define_decode(self._execution, on_gpu=self._on_gpu))
        (decoded,) = graph.run({"images": encoded})
        return list(decoded)

    def render(
        self,
        decoded: list[Any],
        arguments: dict[str, NDArray[Any]],
        group: ViewGroupConfig,
        images: slice,
        host: "_HostPixels",
    ) -> None:
        """Render the views of some images of a batch and start their copy to the host.

        Args:
            decoded: the images.
            arguments: name -> [V, len(decoded), ...].
            group: group of the views.
            images: the indices of these images in the batch.
            host: receives the pixels.
        """
        num_views = len(arguments["flip"])
        for kind in _kinds_of_views(group, num_views):
            samples = len(kind.view_indices) * len(decoded)
            key = (group.size_px, kind.interpolation, len(kind.view_indices))
            define = partial(_define_views, group.size_px, kind.interpolation, tuple(arguments), on_gpu=self._on_gpu)
            graph = self._graph(key, samples, define)
            inputs = {name: of_views[kind.view_indices] for name, of_views in arguments.items()}
            flat = {name: values.reshape(samples, *values.shape[2:]) for name, values in inputs.items()}
            (rendered,) = graph.run({"images": decoded * len(kind.view_indices), **flat})
            host.take(kind.view_indices, images, rendered)

    @property
    def _on_gpu(self) -> bool:
        return self._device_id is not None

    def _graph(self, key: Hashable, num_samples: int, define: Callable[[], Any]) -> "_Graph":
        graph = self.graphs.get(key)
        if graph is None or num_samples > graph.max_samples:
            pipeline = define()(
                batch_size=num_samples,
                num_threads=self._execution.num_threads,
                device_id=self._device_id,
                prefetch_queue_depth=1,
                exec_dynamic=True,
            )
            pipeline.build()
            graph = self.graphs[key] = _Graph(pipeline, num_samples)
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
    view_indices: list[int]


def _kinds_of_views(group: ViewGroupConfig, num_views: int) -> list[_KindOfViews]:
    """Group the views by interpolation, a constant of a graph; in all recipes a group has one kind."""
    kinds: dict[str, list[int]] = {}
    for view_index in range(num_views):
        kinds.setdefault(group.transform_of(view_index).interpolation, []).append(view_index)
    return [_KindOfViews(interpolation=interpolation, view_indices=indices) for interpolation, indices in kinds.items()]


class _HostPixels:
    """The pixels of a group on the host; a GPU copies them into pinned memory.

    torch caches released pinned memory and reuses it for the next batch.
    """

    def __init__(self, shape: tuple[int, ...], *, pinned: bool) -> None:
        self._pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self._pinned = pinned
        self._device: torch.device | None = None
        self._copying: list[Any] = []

    def take(self, view_indices: list[int], images: slice, rendered: Any) -> None:
        """Copy views of some images, [len(view_indices) x len(images), S, S, 3]; a copy from a GPU is asynchronous."""
        num_views, num_images, *view_shape = self._pixels.shape
        tensor = from_dlpack(rendered.as_tensor())
        self._device = tensor.device
        views = tensor.view(len(view_indices), -1, *view_shape)
        self._copying.append(rendered)  # DALI reuses its memory as soon as no reference is left
        if len(view_indices) == num_views and views.shape[1] == num_images:
            self._pixels.copy_(views, non_blocking=self._pinned)
            return
        for place, view_index in enumerate(view_indices):
            self._pixels[view_index, images].copy_(views[place], non_blocking=self._pinned)

    def wait(self) -> NDArray[np.uint8]:
        """Return [V, B, S, S, 3] when all copies have ended."""
        if self._pinned:
            torch.cuda.current_stream(self._device).synchronize()
        self._copying.clear()
        pixels: NDArray[np.uint8] = self._pixels.numpy()
        return pixels


def _define_decode(execution: DaliExecution, *, on_gpu: bool) -> Any:
    """Return the pipeline function of the decoding graph."""

    @pipeline_def
    def graph() -> Any:
        encoded = fn.external_source(name="images", device="cpu")
        options = {"device": "mixed", "hw_decoder_load": execution.hw_decoder_load} if on_gpu else {"device": "cpu"}
        return fn.decoders.image(encoded, output_type=types.RGB, **options)

    return graph


def _define_views(size_px: int, interpolation: str, argument_names: Sequence[str], *, on_gpu: bool) -> Any:
    """Return the pipeline function of the graph that renders views of one kind from decoded images."""

    @pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        device = "gpu" if on_gpu else "cpu"
        image = fn.external_source(name="images", device=device, layout="HWC", no_copy=True)
        arguments = {name: fn.external_source(name=name, device="cpu") for name in argument_names}
        crop = fn.slice(image, start=arguments["start"], shape=arguments["shape"], axes=(0, 1))
        interp_type = types.INTERP_LINEAR if interpolation == "bilinear" else types.INTERP_CUBIC
        view = fn.resize(crop, size=(size_px, size_px), interp_type=interp_type, antialias=True, dtype=types.UINT8)
        view = _recolour(view, arguments)
        view = _blur_and_solarize(view, arguments)
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
    return fn.cast(levels, dtype=types.UINT8)


def _jitter_once(levels: Any, operation: Any, arguments: dict[str, Any]) -> Any:
    if operation == color.BRIGHTNESS:
        out = math.min(levels * arguments["brightness"], color.LEVEL_MAX)
    elif operation == color.CONTRAST:
        mean = fn.reductions.sum(fn.reductions.mean(levels, axes=(0, 1)) * types.Constant(_WEIGHTS))
        factor = arguments["contrast"]
        out = _clamp(levels * factor + mean * (1.0 - factor))
    elif operation == color.SATURATION:
        out = _clamp(fn.coord_transform(levels, M=arguments["saturation_matrix"]))
    else:
        out = _shift_hue(levels, arguments["hue_of_channels"])
    return out


def _clamp(levels: Any) -> Any:
    return math.max(math.min(levels, color.LEVEL_MAX), 0.0)  # takes two thirds of the time of math.clamp


def _shift_hue(levels: Any, shifts: Any) -> Any:
    """Shift the hue in HSV, in sextants from -3 to 3, without a case for each sextant.

    With value v and chroma c of a pixel, |hue| = 2 + (green + blue - red - v) / c; the hue is negative if blue > green. A
    channel at hue p (red 0, green 2, blue 4) is v - c x clamp(d - 1, 0, 1). Here d is the distance of the shifted hue from p
    on the circle: |d'| up to 3 and 6 - |d'| beyond, with d' = hue + shift - p.

    Args:
        levels: [H, W, 3].
        shifts: [3]: shift - p of each channel, -3 to 3.
    """
    red, green, blue = (levels[:, :, channel : channel + 1] for channel in range(3))
    value = math.max(math.max(red, green), blue)
    chroma = value - math.min(math.min(red, green), blue)
    distance = (green + blue - red - value) / math.max(chroma, 1e-6) + 2.0
    hue = distance * ((green >= blue) * 2.0 - 1.0)
    channels = []
    for channel in range(3):
        way = math.abs(math.abs(hue + shifts[channel]) - 3.0)  # 3 - d
        channels.append(value - chroma * math.max(math.min(2.0 - way, 1.0), 0.0))
    return fn.cat(*channels, axis=2)


def _blur_and_solarize(view: Any, arguments: dict[str, Any]) -> Any:
    if arguments["is_blur"]:
        view = fn.gaussian_blur(view, sigma=arguments["sigma"], window_size=arguments["kernel_px"])
    if arguments["is_solarize"]:
        is_bright = fn.cast(view >= 128, dtype=types.UINT8)
        view = fn.cast(is_bright * (255 - view) + (1 - is_bright) * view, dtype=types.UINT8)
    return view


def _arguments(plan: ViewPlan, group: ViewGroupConfig, failures: dict[int, str]) -> dict[str, NDArray[Any]]:
    """Return the per-sample arguments of all views, [V, B, ...]; failed images are placeholders of one pixel."""
    start = np.stack([plan.top, plan.left], axis=-1).astype(np.int32)
    shape = np.stack([plan.height, plan.width], axis=-1).astype(np.int32)
    start[:, list(failures)] = 0
    shape[:, list(failures)] = 1
    saturation = plan.saturation[..., None, None]
    matrix = saturation * np.eye(3, dtype=np.float32) + (1.0 - saturation) * _WEIGHTS[None, None, None, :]
    kernel_px = _kernels_px(plan, group)
    is_blur = kernel_px > 1
    return {
        "start": start,
        "shape": shape,
        "is_jitter": plan.jitter,
        "order": plan.jitter_order.astype(np.int32),
        "brightness": plan.brightness,
        "contrast": plan.contrast,
        "saturation_matrix": matrix.astype(np.float32),
        "hue_of_channels": _hue_of_channels(plan.hue_turns),
        "is_grey": plan.grayscale,
        "is_blur": is_blur,
        "sigma": np.where(is_blur, plan.blur_sigma_px, 1.0).astype(np.float32),
        "kernel_px": kernel_px,
        "is_solarize": plan.solarize,
        "flip": plan.flip.astype(np.int32),
    }


def _kernels_px(plan: ViewPlan, group: ViewGroupConfig) -> NDArray[np.int32]:
    """Return the width of every view's blur kernel, [V, B]; 1: no blur."""
    kernels_px = np.ones(plan.blur_sigma_px.shape, np.int32)
    for view_index, image_index in zip(*plan.blur_sigma_px.nonzero(), strict=True):
        sigma_px = float(plan.blur_sigma_px[view_index, image_index])
        widest_px = group.transform_of(int(view_index)).blur_kernel_px
        kernels_px[view_index, image_index] = len(gaussian_kernel(sigma_px, widest_px))
    return kernels_px


def _hue_of_channels(turns: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sextants from red, green and blue to the shifted hue, [V, B, 3], -3 to 3; see `_shift_hue`."""
    beyond = 6.0 * turns[..., None].astype(np.float64) - np.array([0.0, 2.0, 4.0])
    return ((beyond + 3.0) % 6.0 - 3.0).astype(np.float32)


def _bitmap(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    encoded: NDArray[np.uint8] = cv2.imencode(".bmp", np.ascontiguousarray(pixels[:, :, ::-1]))[1]
    return encoded.reshape(-1)
