"""The DALI renderer, for device cpu and gpu: DALI decodes, crops and resizes, `color_batch` does the rest.

One graph decodes each image once. Another crops and resizes all views of a group as one batch of V x B samples that share
the decoded images. Its result goes to torch without a copy. Operations have the meaning and order of `render_cpu`. The crop
is sliced before it is resized, because `resize(roi_*)` would read outside the crop. On a GPU no part waits for the default
stream, so a trainer of the same process works on while its next batch is rendered.

DALI decodes only upright, complete JPEGs. `data.decode` decodes all others on the host and passes them as bitmaps. So odd
images have equal pixels with every renderer, and one bad image never costs a batch.
"""

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hvp_ray.config import DataConfig, RendererName, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb, is_plain_jpeg
from hvp_ray.errors import ConfigError, UnreadableImageError, first_line
from hvp_ray.records import ViewPlan
from hvp_ray.views.color_batch import PlannedOperations, compiled_finish, finish_views, largest_blur_radius_px
from hvp_ray.views.renderer import RenderedBatch

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:  # pragma: no cover (the package is an extra)
    raise ConfigError(
        f"cluster.renderer=dali-* needs the package nvidia-dali-cuda130, which cannot be imported here ({error}): "
        f"pip install 'hvp-ray[dali]', or choose cluster.renderer=cpu"
    ) from error

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

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
        if self._on_gpu:
            if device_id is None:
                device_id = torch.cuda.current_device()  # a trainer that renders inline may use any device
            for group in filter(None, (views.global_views, views.local_views)):  # here, not in the first batch
                compiled_finish(torch.device("cuda", device_id), group.size_px, largest_blur_radius_px(group))
        self._execution = execution or (ON_A_GPU if self._on_gpu else ON_A_CPU)
        self._lanes = [
            _Lane(self._execution, device_id if self._on_gpu else None) for _ in range(self._execution.num_lanes)
        ]
        self._host_threads = ThreadPoolExecutor(len(self._lanes), thread_name_prefix="dali")

    def render(
        self, images: Sequence[bytes], global_plan: ViewPlan, local_plan: ViewPlan | None = None
    ) -> RenderedBatch:
        """Render the batch; if DALI rejects it, decode every image on the host and render again."""
        encoded, failures = self.prepare(images, on_host=False)
        try:
            outputs = self._run(encoded, global_plan, local_plan, failures)
        except _RejectedError as error:
            logger.warning("DALI rejected a batch (%s); decoding it on the host", first_line(error))
            for lane in self._lanes:
                lane.graphs.clear()  # a graph that raised cannot run again
            encoded, failures = self.prepare(images, on_host=True)
            outputs = self._run(encoded, global_plan, local_plan, failures)
        return RenderedBatch(
            global_pixels=outputs[0], local_pixels=outputs[1] if len(outputs) > 1 else None, failures=failures
        )

    def prepare(self, images: Sequence[bytes], *, on_host: bool) -> tuple[list[NDArray[np.uint8]], dict[int, str]]:
        """Return the input of DALI's decoder, and index -> reason of unreadable images, which become one black pixel.

        Plain JPEGs are passed unchanged, unless `on_host`. Other images are passed as bitmaps.
        """
        encoded: list[NDArray[np.uint8]] = []
        failures: dict[int, str] = {}
        limit, intensity_range = self._data.max_image_pixels, self._data.intensity_range
        for index, image in enumerate(images):
            try:
                is_plain = not on_host and is_plain_jpeg(image, max_pixels=limit)  # DALI has no size limit
                if is_plain and image.rfind(_END_OF_JPEG, -_TAIL_BYTES) >= 0:
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
        crops, operations = crops_of(plan, failures or {}), PlannedOperations.of(plan, group)

        def render(lane: "_Lane", images: slice) -> None:
            lane.render(decoded[images], crops, operations, group, images, host)

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
    """The graphs of one host thread, kept for the largest batch so far, and its CUDA stream."""

    def __init__(self, execution: DaliExecution, device_id: int | None) -> None:
        self._execution = execution
        self._device_id = device_id
        self._stream = None if device_id is None else torch.cuda.Stream(device_id)
        self.graphs: dict[Hashable, _Graph] = {}

    def decode(self, encoded: list[NDArray[np.uint8]]) -> list[Any]:
        """See `DaliRenderer.decode`."""
        graph = self._graph("decode", len(encoded), lambda: _define_decode(self._execution, on_gpu=self._on_gpu))
        (decoded,) = graph.run({"images": encoded})
        return list(decoded)

    def render(
        self,
        decoded: list[Any],
        crops: dict[str, NDArray[np.int32]],
        operations: PlannedOperations,
        group: ViewGroupConfig,
        images: slice,
        host: "_HostPixels",
    ) -> None:
        """Render the views of some images of a batch and start their copy to the host.

        Args:
            decoded: these images.
            crops: start and shape of all views of all images, [V, B, 2].
            operations: of all views of all images.
            group: group of the views.
            images: the indices of these images in the batch.
            host: receives the pixels.
        """
        for kind in _kinds_of_views(group, len(crops["start"])):
            samples = len(kind.view_indices) * len(decoded)
            key = (group.size_px, kind.interpolation, len(kind.view_indices))
            define = partial(_define_views, group.size_px, kind.interpolation, on_gpu=self._on_gpu)
            flat = {name: of_all[kind.view_indices, images].reshape(samples, 2) for name, of_all in crops.items()}
            graph = self._graph(key, samples, define)
            (resized,) = graph.run({"images": decoded * len(kind.view_indices), **flat})  # DALI's work has ended
            with self._on_stream():
                views = finish_views(from_dlpack(resized.as_tensor()), operations.of_samples(kind.view_indices, images))
                host.take(kind.view_indices, images, views, keep=resized)

    @property
    def _on_gpu(self) -> bool:
        return self._device_id is not None

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Use the lane's stream and its device, which is no setting of this thread; without a GPU touch no CUDA."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device_id), torch.cuda.stream(self._stream):
            yield

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
        try:
            for name, values in inputs.items():
                self.pipeline.feed_input(name, values)
            return self.pipeline.run()
        except RuntimeError as error:
            raise _RejectedError(first_line(error)) from error


class _RejectedError(Exception):
    """DALI cannot render a batch; the graph cannot run again."""


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
        self._copying: list[tuple[Any, torch.cuda.Event | None]] = []

    def take(self, view_indices: list[int], images: slice, rendered: Tensor, *, keep: Any) -> None:
        """Copy views of some images, [len(view_indices) x len(images), S, S, 3]; on the current stream of a GPU.

        `keep` is kept until all copies have ended: DALI reuses its memory as soon as no reference is left.
        """
        num_views, num_images, *view_shape = self._pixels.shape
        views = rendered.view(len(view_indices), -1, *view_shape)
        if not self._pinned and len(view_indices) == num_views and views.shape[1] == num_images:
            self._pixels = views
        else:
            for place, view_index in enumerate(view_indices):
                self._pixels[view_index, images].copy_(views[place], non_blocking=self._pinned)
        copied = torch.cuda.current_stream(rendered.device).record_event() if self._pinned else None
        self._copying.append((keep, copied))

    def wait(self) -> NDArray[np.uint8]:
        """Return [V, B, S, S, 3] when all copies have ended."""
        for _, copied in self._copying:
            if copied is not None:
                copied.synchronize()
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


def _define_views(size_px: int, interpolation: str, *, on_gpu: bool) -> Any:
    """Return the pipeline function of the graph that crops and resizes views of one kind from decoded images."""

    @pipeline_def
    def graph() -> Any:
        device = "gpu" if on_gpu else "cpu"
        image = fn.external_source(name="images", device=device, layout="HWC", no_copy=True)
        start, shape = (fn.external_source(name=name, device="cpu") for name in ("start", "shape"))
        crop = fn.slice(image, start=start, shape=shape, axes=(0, 1))
        interp_type = types.INTERP_LINEAR if interpolation == "bilinear" else types.INTERP_CUBIC
        return fn.resize(crop, size=(size_px, size_px), interp_type=interp_type, antialias=True, dtype=types.UINT8)

    return graph


def crops_of(plan: ViewPlan, failures: dict[int, str]) -> dict[str, NDArray[np.int32]]:
    """Return start and shape of every crop, [V, B, 2]; failed images are placeholders of one pixel."""
    start = np.stack([plan.top, plan.left], axis=-1).astype(np.int32)
    shape = np.stack([plan.height, plan.width], axis=-1).astype(np.int32)
    start[:, list(failures)] = 0
    shape[:, list(failures)] = 1
    return {"start": start, "shape": shape}


def _bitmap(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    encoded: NDArray[np.uint8] = cv2.imencode(".bmp", np.ascontiguousarray(pixels[:, :, ::-1]))[1]
    return encoded.reshape(-1)
