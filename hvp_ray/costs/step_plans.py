"""Plans of a hard step for images of given sizes, which need not exist."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import RunConfig, ViewGroupConfig
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.selection import hard_step
from hvp_ray.views.masks import draw_masks
from hvp_ray.views.plan import draw_plan


def draw_step_plans(
    config: RunConfig, heights: NDArray[np.int32], widths: NDArray[np.int32]
) -> tuple[ViewPlan, ViewPlan | None]:
    """Draw the global and the local views of step 0 for images [B], numbered from 0. None: there are no local views."""
    images: dict[str, Any] = {"seed": 0, "epoch": 0, "sample_ids": np.arange(len(heights))}

    def draw(purpose: Purpose, num_views: int, group: ViewGroupConfig) -> ViewPlan:
        return draw_plan(
            purpose=purpose,
            num_views=num_views,
            group=group,
            image_sizes=(heights, widths),
            channels=config.data.channels,
            **images,
        )

    of_step, views = hard_step(config.selection), config.views
    num_views = of_step.num_views
    of_globals, of_locals = draw(Purpose.GLOBAL_VIEWS, num_views, views.global_views), None
    if views.masks is not None:
        size_px = views.global_views.size_px
        mask = draw_masks(purpose=Purpose.MASKS, num_views=num_views, size_px=size_px, masks=views.masks, **images)
        of_globals = dataclasses.replace(of_globals, mask=mask)
    if views.local_views is not None:
        of_locals = draw(Purpose.LOCAL_VIEWS, of_step.num_local_views, views.local_views)
    return of_globals, of_locals
