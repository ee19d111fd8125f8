"""The DALI renderer: one fused graph for device cpu and gpu, driven by the plan as per-sample arguments.

Same meaning and order of operations as `render_cpu`; colour is computed in float32 with a clamp after each operation
and rounded once. The crop is sliced first and then resized: `resize(roi_*)` would read outside the crop.

Only upright, complete JPEGs are decoded by DALI. Everything else is decoded on the host by `data.decode` and handed
over as a bitmap, so that odd images have the same pixels with every renderer, and one bad image never costs a batch.
"""

import logging
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import RendererName, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb, is_plain_jpeg, read_size
from hvp_ray.errors import ConfigError, UnreadableImageError
from hvp_ray.records import ViewPlan
from hvp_ray.views import color
from hvp_ray.views.renderer import RenderedBatch

try:
    from nvidia.dali import fn, math, pipeline_def, types
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


class DaliRenderer:
    """Renders with NVIDIA DALI; see `Renderer`. Graphs are built for each number of views and kept."""

    def __init__(
        self, views: ViewsConfig, *, name: RendererName, max_image_pixels: int, num_threads: int = 1, device_id: int = 0
    ) -> None:
        self.name: RendererName = name
        self._views = views
        self._max_image_pixels = max_image_pixels
        self._num_threads = num_threads
        self._device_id = device_id if name == "dali-gpu" else None
        self._pipelines: dict[tuple[int, int, int], Any] = {}

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
            self._pipelines.clear()  # a pipeline that has raised cannot go on
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
        groups = [(global_plan, self._views.global_views, "global")]
        if local_plan is not None:
            assert self._views.local_views is not None
            groups.append((local_plan, self._views.local_views, "local"))
        num_local = local_plan.num_views if local_plan is not None else 0
        pipeline = self._pipeline(global_plan.num_views, num_local, len(encoded))
        pipeline.feed_input("images", encoded)
        for plan, _, prefix in groups:
            for view_index in range(plan.num_views):
                for argument, values in _arguments(plan, view_index, failures).items():
                    pipeline.feed_input(f"{prefix}{view_index}_{argument}", values)
        rendered = [_to_host(output) for output in pipeline.run()]
        outputs = []
        for plan, group, _ in groups:
            pixels = np.empty((plan.num_views, len(encoded), group.size_px, group.size_px, 3), np.uint8)
            for view_index in range(plan.num_views):
                pixels[view_index] = rendered.pop(0)
            pixels[:, list(failures)] = 0
            outputs.append(pixels)
        return outputs

    def _pipeline(self, num_global: int, num_local: int, num_images: int) -> Any:
        largest = max((key[2] for key in self._pipelines if key[:2] == (num_global, num_local)), default=0)
        if num_images > largest:
            self._pipelines.pop((num_global, num_local, largest), None)
            largest = num_images
            graph = _define_graph(self._views, num_global, num_local, on_gpu=self._device_id is not None)
            pipeline = graph(
                batch_size=num_images,
                num_threads=self._num_threads,
                device_id=self._device_id,
                prefetch_queue_depth=1,
                exec_dynamic=True,
            )
            pipeline.build()
            self._pipelines[num_global, num_local, largest] = pipeline
        return self._pipelines[num_global, num_local, largest]


def _define_graph(views: ViewsConfig, num_global: int, num_local: int, *, on_gpu: bool) -> Any:
    """Return the pipeline function of one decode and num_global + num_local views."""

    @pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        encoded = fn.external_source(name="images", device="cpu")
        image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        outputs = [_define_view(image, f"global{index}_", views.global_views, index) for index in range(num_global)]
        if views.local_views is not None:
            outputs += [_define_view(image, f"local{index}_", views.local_views, index) for index in range(num_local)]
        return tuple(outputs)

    return graph


def _define_view(image: Any, prefix: str, group: ViewGroupConfig, view_index: int) -> Any:
    """Add the operations of one view to the graph."""
    transform = group.transform_of(view_index)
    arguments = {name: fn.external_source(name=prefix + name, device="cpu") for name in _ARGUMENTS}
    crop = fn.slice(image, start=arguments["start"], shape=arguments["shape"], axes=(0, 1))
    interpolation = types.INTERP_LINEAR if transform.interpolation == "bilinear" else types.INTERP_CUBIC
    view = fn.resize(
        crop, size=(group.size_px, group.size_px), interp_type=interpolation, antialias=True, dtype=types.UINT8
    )
    view = _recolour(view, arguments)
    view = _blur_and_solarize(view, arguments, transform.blur_kernel_px)
    return fn.flip(view, horizontal=arguments["flip"])


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


def _arguments(plan: ViewPlan, view_index: int, failures: dict[int, str]) -> dict[str, Any]:
    """Return the per-sample arguments of one view; failed images are placeholders of one pixel."""
    v = view_index
    start = np.stack([plan.top[v], plan.left[v]], axis=1).astype(np.int32)
    shape = np.stack([plan.height[v], plan.width[v]], axis=1).astype(np.int32)
    start[list(failures)] = 0
    shape[list(failures)] = 1
    saturation = plan.saturation[v][:, None, None]
    matrix = saturation * np.eye(3, dtype=np.float32) + (1.0 - saturation) * _WEIGHTS[None, None, :]
    is_blur = plan.blur_sigma_px[v] > 0.0
    values = {
        "start": start,
        "shape": shape,
        "is_jitter": plan.jitter[v],
        "order": plan.jitter_order[v].astype(np.int32),
        "brightness": plan.brightness[v],
        "contrast": plan.contrast[v],
        "saturation_matrix": matrix.astype(np.float32),
        "hue": (plan.hue_turns[v] % 1.0).astype(np.float32),
        "is_grey": plan.grayscale[v],
        "is_blur": is_blur,
        "sigma": np.where(is_blur, plan.blur_sigma_px[v], 1.0).astype(np.float32),
        "is_solarize": plan.solarize[v],
        "flip": plan.flip[v].astype(np.int32),
    }
    return {name: np.ascontiguousarray(array) for name, array in values.items()}


def _bitmap(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    encoded: NDArray[np.uint8] = cv2.imencode(".bmp", np.ascontiguousarray(pixels[:, :, ::-1]))[1]
    return encoded.reshape(-1)


def _to_host(output: Any) -> NDArray[np.uint8]:
    on_host = output.as_cpu() if hasattr(output, "as_cpu") else output
    pixels: NDArray[np.uint8] = on_host.as_array()
    return pixels
