"""A digest of the pixels of a few training views, to tell whether other versions of libraries render other pixels.

`runs/record.py` records it when a run is new, and renders the sample again when a resume finds other versions. It does not
use Ray: the process that prepares the run renders, from plans and by code that view workers use too.
"""

import dataclasses
import hashlib
import logging
from dataclasses import dataclass
from typing import Any

from hvp_ray.config import RendererName, RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.order import SampleOrder
from hvp_ray.errors import HvpRayError, first_line
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.render_batch import build_render_context, render_batch

logger = logging.getLogger(__name__)

_NUM_IMAGES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedSample:
    """What config.json records of the sample."""

    num_images: int
    sha256: str | None
    """Digest of the pixels. None: the sample was not rendered."""
    reason: str | None
    """Why the sample was not rendered."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def render_sample(
    config: RunConfig, dataset: Dataset, order: SampleOrder, renderer: RendererName, *, search_crashing: bool
) -> RenderedSample:
    """Render the first images of the first step with their views. A failure is recorded as a reason, never raised.

    Args:
        config: the run.
        dataset: its opened data.
        order: the order of its samples.
        renderer: its renderer. DALI is not sampled: it takes seconds to start, and a GPU that the trainers need.
        search_crashing: decode the images in a child process first, because this process must not die of them. It takes half
            a second.
    """
    if renderer != "cpu":
        return _without_pixels(f"only views of the renderer cpu are sampled, and this run has {renderer}")
    request = requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})(0)
    # From a source that reads whole blocks, neighbours: the images of a step may lie in as many blocks.
    ids = dataset.training_ids if dataset.source.reads_whole_blocks else request.sample_ids
    request = dataclasses.replace(
        request, sample_ids=ids[:_NUM_IMAGES].copy(), num_probe_images=0, search_crashing=search_crashing
    )
    try:
        batch = render_batch(build_render_context(config, dataset, renderer), request, worker="sample")
    except (HvpRayError, OSError, MemoryError) as error:
        logger.warning("the sample of rendered views could not be made: %s", first_line(error))
        return _without_pixels(first_line(error))
    digest = hashlib.sha256(batch.global_views.pixels.tobytes())
    if batch.local_views is not None:
        digest.update(batch.local_views.pixels.tobytes())
    return RenderedSample(num_images=len(request.sample_ids), sha256=digest.hexdigest(), reason=None)


def _without_pixels(reason: str) -> RenderedSample:
    return RenderedSample(num_images=0, sha256=None, reason=reason)
