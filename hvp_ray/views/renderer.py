"""The renderer interface: pixels as a deterministic function of image bytes and plan.

`render_cpu.CpuRenderer` and `render_dali.DaliRenderer` implement it; `build_renderer` imports the one that is requested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig, RendererName, ViewsConfig
from hvp_ray.errors import ConfigError
from hvp_ray.records import ViewPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedBatch:
    """Pixels of all views of a batch, and the images that cannot be decoded."""

    global_pixels: NDArray[np.uint8]
    """[V, B, S, S, C]; zeros for failed images."""
    local_pixels: NDArray[np.uint8] | None
    """[L, B, s, s, C]; None: no local views were requested."""
    failures: dict[int, str]
    """Index in the batch -> why the image cannot be decoded."""

    def with_images(self, image_indices: NDArray[np.int64], other: "RenderedBatch") -> "RenderedBatch":
        """Overwrite the views of the images at `image_indices` by those of `other`; return this with its failures."""
        self.global_pixels[:, image_indices] = other.global_pixels
        if self.local_pixels is not None and other.local_pixels is not None:
            self.local_pixels[:, image_indices] = other.local_pixels
        failures = {int(image_indices[place]): reason for place, reason in other.failures.items()}
        return RenderedBatch(global_pixels=self.global_pixels, local_pixels=self.local_pixels, failures=failures)


@runtime_checkable
class Renderer(Protocol):
    """Renders views. A renderer is not thread-safe."""

    name: RendererName

    def render(
        self, images: Sequence[bytes], global_plan: ViewPlan, local_plan: ViewPlan | None = None
    ) -> RenderedBatch:
        """Render every view of the plans; images that cannot be decoded are reported, never raised."""
        ...


def build_renderer(name: RendererName, views: ViewsConfig, data: DataConfig) -> Renderer:
    """Build the renderer of this name.

    Raises:
        ConfigError: the name is unknown, or DALI is needed and cannot be imported.
    """
    match name:
        case "cpu":
            from hvp_ray.views.render_cpu import CpuRenderer

            return CpuRenderer(views, data)
        case "dali-cpu" | "dali-gpu":
            from hvp_ray.views.render_dali import DaliRenderer

            return DaliRenderer(views, data, name=name)
    raise ConfigError(f"cluster.renderer={name!r} is unknown; choose cpu, dali-cpu or dali-gpu")
