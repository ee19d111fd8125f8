"""Find the images of a batch that must not be decoded: each of them kills a process on its own.

A view worker does this instead of rendering where a batch was in flight at several deaths. It looks at the images of the
batch first, and where all of them are harmless, at those that would take the place of damaged ones.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from hvp_ray.config import DataConfig, RendererName
from hvp_ray.data.decode import decode_rgb
from hvp_ray.errors import UnreadableImageError
from hvp_ray.records import BatchRequest, ViewPlan
from hvp_ray.stream.isolation import CRASHES_DECODER, DECODER, find_crashing_images
from hvp_ray.stream.render_batch import RenderContext, read_images, render_batch
from hvp_ray.views.renderer import RenderedBatch


def find_crashing_ids(context: RenderContext, request: BatchRequest, *, decoder: str = DECODER) -> list[int]:
    """Return the sample ids that crash a decoder's process on their own and that rendering `request` would decode."""
    ids = [i for i in request.sample_ids.tolist() if i not in request.quarantined_ids]
    images = read_images(context.source, ids).images
    crashing = find_crashing_images(images, max_pixels=context.data.max_image_pixels, decoder=decoder)
    if crashing:
        return [ids[index] for index in crashing]
    apart = _DecodesApart(context.data, decoder)
    batch = render_batch(dataclasses.replace(context, renderer=apart), request)
    found = {r.unreadable_id for r in batch.replacements if r.reason == CRASHES_DECODER}
    return sorted(found.difference(request.quarantined_ids))


class _DecodesApart:
    """Implements `Renderer`: decodes in a process that may die, and renders nothing."""

    name: RendererName = "cpu"

    def __init__(self, data: DataConfig, decoder: str) -> None:
        self._max_pixels = data.max_image_pixels
        self._intensity_range = data.intensity_range
        self._decoder = decoder

    def render(
        self, images: Sequence[bytes], global_plan: ViewPlan, local_plan: ViewPlan | None = None
    ) -> RenderedBatch:
        failures = dict.fromkeys(
            find_crashing_images(images, max_pixels=self._max_pixels, decoder=self._decoder), CRASHES_DECODER
        )
        for index, image in enumerate(images):
            if index not in failures:
                try:
                    decode_rgb(image, max_pixels=self._max_pixels, intensity_range=self._intensity_range)
                except UnreadableImageError as error:
                    failures[index] = str(error)

        def no_pixels(plan: ViewPlan) -> np.ndarray:
            return np.zeros((plan.num_views, plan.num_images, 1, 1, 3), np.uint8)

        return RenderedBatch(
            global_pixels=no_pixels(global_plan),
            local_pixels=None if local_plan is None else no_pixels(local_plan),
            failures=failures,
        )
