"""Values of the settings that may be `auto`, resolved once before a run starts and read by all code after that."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hvp_ray.config import ClusterConfig, RendererName

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRun:
    """Values of one run in place of `auto`."""

    renderer: RendererName
    device: Device
    """Device that trainers run on."""
    num_view_workers: int = 0
    """0: each trainer renders its own views."""
    batches_in_flight: int = 0
    """Batches that each trainer prefetches. 0: none."""
    trainer_resources: Mapping[str, float] = field(default_factory=dict)
    """Ray resource -> amount that one trainer reserves."""
    view_worker_resources: Mapping[str, float] = field(default_factory=dict)
    """Ray resource -> amount that one view worker reserves."""


def resolve_inline(cluster: ClusterConfig) -> ResolvedRun:
    """Resolve a run without Ray. `auto` means the CPU, because such a run takes no device unasked."""
    if cluster.device == "cuda":
        return ResolvedRun(renderer=renderer_of(cluster), device="cuda", batches_in_flight=1)
    return ResolvedRun(renderer=renderer_of(cluster), device="cpu")


def renderer_of(cluster: ClusterConfig) -> RendererName:
    """Return the renderer of a run. It follows from the settings alone, so a run keeps it on every machine."""
    return "cpu" if cluster.renderer == "auto" else cluster.renderer


def names_left_to_auto(cluster: ClusterConfig) -> list[str]:
    """Return which of renderer and device are `auto`, as parts of a run's identity."""
    return [name for name in ("renderer", "device") if getattr(cluster, name) == "auto"]
