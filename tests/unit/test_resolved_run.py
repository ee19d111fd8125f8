"""What `auto` means without a cluster."""

import pytest

from hvp_ray.config import ClusterConfig
from hvp_ray.resolved_run import names_left_to_auto, renderer_of, resolve_inline


def test_a_run_without_ray_takes_the_cpu_unless_told_otherwise() -> None:
    resolved = resolve_inline(ClusterConfig())
    assert (resolved.renderer, resolved.device, resolved.num_view_workers) == ("cpu", "cpu", 0)
    assert resolve_inline(ClusterConfig(device="cuda")).device == "cuda"


@pytest.mark.parametrize(("renderer", "resolved"), [("auto", "cpu"), ("cpu", "cpu"), ("dali-cpu", "dali-cpu")])
def test_the_renderer_follows_from_the_settings(renderer: str, resolved: str) -> None:
    assert renderer_of(ClusterConfig(renderer=renderer)) == resolved


def test_names_left_to_auto_are_parts_of_the_identity() -> None:
    assert names_left_to_auto(ClusterConfig()) == ["renderer", "device"]
    assert names_left_to_auto(ClusterConfig(renderer="cpu", device="cpu")) == []
