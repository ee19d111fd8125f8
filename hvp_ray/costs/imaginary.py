"""An imaginary step: the real networks and code of a run on tensors that have shapes and no storage.

Torch's fake tensors go through scoring, choice, forward, backward and update as real ones do. So `memory.py` and
`operations.py` can count memory and operations of any recipe, on any machine, in seconds and in little more than the
memory of the weights.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hvp_ray.config import RunConfig, ViewGroupConfig
from hvp_ray.costs.step_plans import draw_step_plans
from hvp_ray.distributed.world import World
from hvp_ray.methods.method import StepPosition
from hvp_ray.records import ViewPlan, Views
from hvp_ray.selection import hard_step
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.training.trainee import Trainee, build_trainee_of, build_untrained_method

_IMAGE_PX = 256
"""Size of the imaginary images. It has no effect on a step."""


LATE_STEP = StepPosition(step=9_999, num_steps=10_000, steps_per_epoch=1)
"""Position of a typical step. The first epochs of a run may not train all parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImaginaryStep:
    """Inputs of a step, valid inside `imagine_step`."""

    config: RunConfig
    """One trainer of the run, alone."""
    trainee: Trainee
    optimizer: torch.optim.Optimizer
    batch: DeviceBatch


@contextlib.contextmanager
def imagine_step(config: RunConfig) -> Iterator[ImaginaryStep]:
    """Yield one trainer's networks and batch without content. Results computed in the context have none either."""
    alone = config.of_one_trainer()
    alone = dataclasses.replace(
        alone,
        training=dataclasses.replace(alone.training, initial_weights=None),
        method=dataclasses.replace(
            config.method, backbone=dataclasses.replace(config.method.backbone, pretrained=False)
        ),
    )
    method = build_untrained_method(alone).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode:
        _drop_content(method, fake_mode)
        trainee = build_trainee_of(method, alone, World(), torch.device("cpu"))
        method.begin_step(LATE_STEP)
        yield ImaginaryStep(
            config=alone,
            trainee=dataclasses.replace(trainee, optimizer=_UpdateWithoutContent(trainee.optimizer)),
            optimizer=trainee.optimizer,
            batch=made_up_batch(alone, torch.empty),
        )


def _drop_content(method: nn.Module, fake_mode: FakeTensorMode) -> None:
    """Replace all weights by tensors without content.

    A network cannot be built without content, because timm reads some values. The parameters are new objects, so build the
    optimizer afterwards.
    """
    for module in method.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = fake_mode.from_tensor(parameter.detach())
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake_mode.from_tensor(buffer)


def made_up_batch(config: RunConfig, pixels_of: Callable[..., Tensor]) -> DeviceBatch:
    """Return a batch of step 0 with a real plan and made-up pixels, `pixels_of(shape, dtype=torch.uint8)`."""
    count = config.training.images_per_step
    sizes = np.full(count, _IMAGE_PX, np.int32)

    def views(plan: ViewPlan, group: ViewGroupConfig) -> tuple[Views, Tensor]:
        shape = (plan.num_views, plan.num_images, group.size_px, group.size_px, config.data.channels)
        return Views(pixels=np.broadcast_to(np.uint8(0), shape), plan=plan), pixels_of(shape, dtype=torch.uint8)

    global_plan, local_plan = draw_step_plans(config, sizes, sizes)
    of_globals, global_pixels = views(global_plan, config.views.global_views)
    of_locals, local_pixels = None, None
    if local_plan is not None and config.views.local_views is not None:
        of_locals, local_pixels = views(local_plan, config.views.local_views)
    of_probes, probe_pixels = None, None
    if num_probes := hard_step(config.selection).num_probe_images:
        probed = dataclasses.replace(config, selection=config.selection.with_rule("hardest"))
        probe_plan, _ = draw_step_plans(probed, sizes[:num_probes], sizes[:num_probes])
        of_probes, probe_pixels = views(probe_plan, config.views.global_views)
    return DeviceBatch(
        step=0,
        epoch=0,
        sample_ids=np.arange(count),
        heights=sizes,
        widths=sizes,
        global_views=of_globals,
        local_views=of_locals,
        probe_views=of_probes,
        replacements=(),
        render_cpu_seconds=0.0,
        render_seconds=0.0,
        worker="",
        global_pixels=global_pixels,
        local_pixels=local_pixels,
        probe_pixels=probe_pixels,
    )


class _UpdateWithoutContent(torch.optim.Optimizer):
    """Ends AdamW's update when it reads its step counter, which has no content. Its state exists by then."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 (torch's signature)
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Any = None) -> Any:
        with contextlib.suppress(DataDependentOutputException):
            self._optimizer.step()
