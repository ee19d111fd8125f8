"""Make a batch of views as a pure function of its request: read, plan, render, replace what cannot be decoded.

View workers call this. It does not use Ray, and `InlineBatches` calls it in the trainer's process. `decode_batch` and
`finish_batch` split the work between two processes, with the same bits as `render_batch`.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig, RendererName, RunConfig, ViewsConfig, config_from_dict
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.data.decode import read_size
from hvp_ray.data.source import Source
from hvp_ray.errors import DataError, UnreadableImageError
from hvp_ray.randomness import Purpose, draw_stream
from hvp_ray.records import (
    BatchDraft,
    BatchFacts,
    BatchRequest,
    DecodedImages,
    Replacement,
    ViewBatch,
    ViewPlan,
    Views,
)
from hvp_ray.selection.proposals import choose_plans
from hvp_ray.stream.quarantine import CRASHES_DECODER, DECODER, failures_apart
from hvp_ray.stream.reading import read_images
from hvp_ray.views.decoded import decode_used
from hvp_ray.views.masks import draw_masks
from hvp_ray.views.plan import draw_plan
from hvp_ray.views.render_cpu import CpuRenderer
from hvp_ray.views.renderer import RenderedBatch, Renderer, build_renderer

logger = logging.getLogger(__name__)

_REPLACEMENT_ATTEMPTS = 1000

_NOT_BY_CHANCE = 1e-9
"""If no image was readable so far, a batch fails once damage within the limit makes that less probable than this."""

_Made = TypeVar("_Made", RenderedBatch, DecodedImages)
"""Content of a batch: views, or the pixels to render them from."""

_Make = Callable[[Sequence[bytes], ViewPlan, ViewPlan | None], _Made]
"""Maps encoded images and their global and local plans to the content of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderContext:
    """Objects that all batches of a run share."""

    seed: int
    source: Source
    training_ids: NDArray[np.int64]
    """[N]: replacements are drawn from these."""
    data: DataConfig
    views: ViewsConfig
    renderer: Renderer


def build_render_context(config: RunConfig, dataset: Dataset, renderer: RendererName) -> RenderContext:
    """Return the context of a run in the process that renders.

    Raises:
        ConfigError: the renderer is not available on this machine.
    """
    return RenderContext(
        seed=config.run.seed,
        source=dataset.source,
        training_ids=dataset.training_ids,
        data=config.data,
        views=config.views,
        renderer=build_renderer(renderer, config.views, config.data),
    )


def open_render_context(
    config_values: dict[str, Any], renderer: RendererName, data_fingerprint: str | None = None
) -> RenderContext:
    """Open the data and make the renderer of a run, in the process that renders.

    Args:
        config_values: config of the run, see `config_to_dict`.
        renderer: the resolved renderer.
        data_fingerprint: see `open_dataset`.

    Raises:
        DataError: the source cannot be opened here, or its images have changed since the run was started.
        ConfigError: the renderer is not available on this machine.
    """
    config = config_from_dict(config_values)
    return build_render_context(config, open_dataset(config.data, fingerprint=data_fingerprint), renderer)


def render_batch(context: RenderContext, request: BatchRequest, *, worker: str = "inline") -> ViewBatch:
    """Return the batch that `request` addresses; the same bits for the same request, on any worker.

    An image that cannot be decoded is replaced by another one, drawn from (seed, epoch, position, attempt), with a view
    stream of its own. The replacement is new to the batch, unless the batch already has all other readable images. Then it
    repeats an image with other views.

    Raises:
        DataError: the storage failed repeatedly, or no image is readable.
        StageError: the search for crashing images failed, see `find_crashing_ids`.
    """
    draft, rendered = _assemble(context, request, context.renderer.render, worker)
    batch = _with_views(draft, rendered)
    if request.num_probe_images:
        batch = _with_probes(batch, render_batch(context, _probe_request(request, draft), worker=worker))
    return batch


def decode_batch(
    context: RenderContext, request: BatchRequest, *, worker: str = "inline"
) -> tuple[BatchDraft, DecodedImages]:
    """Return the result of `render_batch` without the views, and the pixels to render them from.

    Raises:
        DataError: see `render_batch`.
        StageError: see `render_batch`.
    """
    draft, decoded = _assemble(context, request, partial(decode_used, data=context.data), worker)
    if request.num_probe_images:
        probe_draft, probe_images = decode_batch(context, _probe_request(request, draft), worker=worker)
        draft = dataclasses.replace(
            draft,
            render_cpu_seconds=draft.render_cpu_seconds + probe_draft.render_cpu_seconds,
            render_seconds=draft.render_seconds + probe_draft.render_seconds,
            probes=(dataclasses.replace(probe_draft, render_cpu_seconds=0.0, render_seconds=0.0), probe_images),
        )
    return draft, decoded


def _probe_request(request: BatchRequest, draft: BatchDraft) -> BatchRequest:
    """Return the request of a step's probe views: the first plans of its first images, with the same replacements."""
    count = request.num_probe_images
    return dataclasses.replace(
        request,
        sample_ids=request.sample_ids[:count],
        num_views=request.num_probe_views,
        num_local_views=0,
        proposal=None,
        num_probe_images=0,
        known_replacements=tuple(r for r in draft.replacements if r.index < count),
        quarantined_ids=(*request.quarantined_ids, *draft.crashing_ids),
        search_crashing=False,
    )


def _assemble(
    context: RenderContext, request: BatchRequest, make: _Make[_Made], worker: str
) -> tuple[BatchDraft, _Made]:
    watch = _Watch()
    crashing_ids: tuple[int, ...] = ()
    if request.search_crashing:
        crashing_ids = find_crashing_ids(context, request)
        request = dataclasses.replace(request, quarantined_ids=(*request.quarantined_ids, *crashing_ids))
    assembly = _Assembly(context, request, make)
    made = assembly.fill()
    cpu_seconds, seconds = watch.read()
    draft = BatchDraft(
        step=request.step,
        epoch=request.epoch,
        sample_ids=assembly.sample_ids,
        heights=assembly.heights,
        widths=assembly.widths,
        global_plan=assembly.global_plan,
        local_plan=assembly.local_plan,
        replacements=tuple(assembly.replacements),
        render_cpu_seconds=cpu_seconds,
        render_seconds=seconds,
        worker=worker,
        crashing_ids=crashing_ids,
    )
    return draft, made


def find_crashing_ids(context: RenderContext, request: BatchRequest, *, decoder: str = DECODER) -> tuple[int, ...]:
    """Return the sample ids that crash a decoder's process and that `request` would decode, also as replacements.

    Ids that are quarantined already are left out.

    Raises:
        DataError: see `render_batch`.
        StageError: see `quarantine.failures_apart`.
    """

    def decode_apart(images: Sequence[bytes], _global: ViewPlan, _local: ViewPlan | None) -> DecodedImages:
        failures = failures_apart(images, context.data, decoder=decoder)
        boxes = np.zeros((len(images), 4), np.int32)
        return DecodedImages(
            pixels=np.zeros(0, np.uint8), boxes=boxes, channels=context.data.channels, failures=failures
        )

    assembly = _Assembly(context, request, decode_apart)
    assembly.fill()
    found = {r.unreadable_id for r in assembly.replacements if r.reason == CRASHES_DECODER}
    return tuple(sorted(found.difference(request.quarantined_ids)))


def finish_batch(renderer: CpuRenderer, draft: BatchDraft, decoded: DecodedImages) -> ViewBatch:
    """Render the views of what `decode_batch` returned."""
    watch = _Watch()
    rendered = renderer.render_decoded(decoded, draft.global_plan, draft.local_plan)
    cpu_seconds, seconds = watch.read()
    draft = dataclasses.replace(
        draft,
        render_cpu_seconds=draft.render_cpu_seconds + cpu_seconds,
        render_seconds=draft.render_seconds + seconds,
    )
    batch = _with_views(draft, rendered, decoded_bytes=decoded.pixels.nbytes)
    return batch if draft.probes is None else _with_probes(batch, finish_batch(renderer, *draft.probes))


def _with_views(draft: BatchDraft, rendered: RenderedBatch, *, decoded_bytes: int = 0) -> ViewBatch:
    local_views = None
    if rendered.local_pixels is not None and draft.local_plan is not None:
        local_views = Views(pixels=rendered.local_pixels, plan=draft.local_plan)
    facts: dict[str, Any] = {field.name: getattr(draft, field.name) for field in dataclasses.fields(BatchFacts)}
    return ViewBatch(
        **facts,
        global_views=Views(pixels=rendered.global_pixels, plan=draft.global_plan),
        local_views=local_views,
        decoded_bytes=decoded_bytes,
    )


def _with_probes(batch: ViewBatch, probes: ViewBatch) -> ViewBatch:
    return dataclasses.replace(
        batch,
        probe_views=probes.global_views,
        decoded_bytes=batch.decoded_bytes + probes.decoded_bytes,
        render_cpu_seconds=batch.render_cpu_seconds + probes.render_cpu_seconds,
        render_seconds=batch.render_seconds + probes.render_seconds,
    )


class _Watch:
    """Measures CPU time of this process and wall time, in seconds since its construction."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        return time.process_time() - self._cpu, time.perf_counter() - self._wall


class _Purposes(NamedTuple):
    """The random streams that the plans of a batch are drawn from."""

    global_views: Purpose
    local_views: Purpose
    masks: Purpose


_FIRST_CHOICE = _Purposes(Purpose.GLOBAL_VIEWS, Purpose.LOCAL_VIEWS, Purpose.MASKS)
_REPLACEMENT = _Purposes(Purpose.REPLACEMENT_VIEWS, Purpose.REPLACEMENT_LOCAL_VIEWS, Purpose.REPLACEMENT_MASKS)


class _Assembly(Generic[_Made]):
    """One batch while it is put together.

    Args:
        context: context of the run.
        request: address of the batch.
        make: makes the views, or the pixels to render them from.
    """

    def __init__(self, context: RenderContext, request: BatchRequest, make: _Make[_Made]) -> None:
        self._context = context
        self._request = request
        self._make: _Make[_Made] = make
        self.sample_ids = request.sample_ids.copy()
        self.heights = np.ones(len(self.sample_ids), np.int32)
        self.widths = np.ones(len(self.sample_ids), np.int32)
        self.replacements: list[Replacement] = []
        known = request.known_replacements
        self._drawn = {replacement.replacement_id for replacement in known}
        """Images that were drawn for the batch, readable or not."""
        self._tried = {*self.sample_ids.tolist(), *request.quarantined_ids, *self._drawn}
        """Images of the batch, and all that were drawn for it."""
        self._unreadable = {replacement.unreadable_id: replacement.reason for replacement in known}
        """Images that failed -> why."""

    def fill(self) -> _Made:
        """Make the batch; replace images until none fails."""
        known = {replacement.index: replacement for replacement in self._request.known_replacements}
        ids = self.sample_ids.tolist()
        failures = {index: CRASHES_DECODER for index, i in enumerate(ids) if i in self._request.quarantined_ids}
        failures |= {index: replacement.reason for index, replacement in known.items()}
        rows = np.arange(len(ids))
        made, failures, self.global_plan, self.local_plan = self._make_rows(rows, failures, _FIRST_CHOICE)
        is_any_readable = False
        while failures:
            for index, reason in sorted(failures.items()):
                self._unreadable.setdefault(int(self.sample_ids[index]), reason)
            is_any_readable = is_any_readable or len(failures) < len(ids)
            # Replacements are drawn independently: n of them fail with a probability of max_unreadable_fraction ** n.
            chance = self._context.data.max_unreadable_fraction ** len(self._drawn)
            if not is_any_readable and chance < _NOT_BY_CHANCE:
                raise self._nothing_readable()
            made, failures = self._replace(made, failures, known)
            known = {}
        return made

    def _make_rows(
        self, rows: NDArray[np.int64], failures: dict[int, str], purposes: _Purposes
    ) -> tuple[_Made, dict[int, str], ViewPlan, ViewPlan | None]:
        """Read, measure, plan and make the images at `rows`, except those that have failed.

        Returns:
            What was made of them, all failures by index in the batch, and their plans.
        """
        failures, data = dict(failures), self._context.data
        images = read_images(self._context.source, self.sample_ids[rows].tolist()).images
        for index, image in zip(rows.tolist(), images, strict=True):
            if index not in failures:
                try:
                    size = read_size(image, max_pixels=data.max_image_pixels, channels=data.channels)
                    self.heights[index], self.widths[index] = size
                except UnreadableImageError as error:
                    failures[index] = str(error)
        global_plan, local_plan = self._draw_plans(rows, purposes)
        # What has failed is passed on as an empty image, which fails at once.
        readable = [b"" if i in failures else image for i, image in zip(rows.tolist(), images, strict=True)]
        made = self._make(readable, global_plan, local_plan)
        failures = {int(rows[place]): reason for place, reason in made.failures.items()} | failures
        return made, failures, global_plan, local_plan

    def _draw_plans(self, rows: NDArray[np.int64], purposes: _Purposes) -> tuple[ViewPlan, ViewPlan | None]:
        views, request, seed = self._context.views, self._request, self._context.seed
        sample_ids, heights, widths = self.sample_ids[rows], self.heights[rows], self.widths[rows]
        draw = partial(
            draw_plan,
            seed=seed,
            epoch=request.epoch,
            sample_ids=sample_ids,
            image_sizes=(heights, widths),
            channels=self._context.data.channels,
        )
        proposal = request.proposal
        num_plans = request.num_views if proposal is None else proposal.num_plans
        global_plan = draw(purpose=purposes.global_views, num_views=num_plans, group=views.global_views)
        if proposal is not None:
            alternating = views.slots_keep_transforms
            global_plan = global_plan.gather(
                choose_plans(global_plan, heights, widths, proposal, alternating=alternating)
            )
        local_plan = None
        if request.num_local_views:
            assert views.local_views is not None
            local_plan = draw(purpose=purposes.local_views, num_views=request.num_local_views, group=views.local_views)
        if views.masks is not None:
            mask = draw_masks(
                seed=seed,
                purpose=purposes.masks,
                epoch=request.epoch,
                sample_ids=sample_ids,
                num_views=request.num_views,
                size_px=views.global_views.size_px,
                masks=views.masks,
            )
            global_plan = dataclasses.replace(global_plan, mask=mask)
        return global_plan, local_plan

    def _replace(
        self, made: _Made, failures: dict[int, str], known: dict[int, Replacement]
    ) -> tuple[_Made, dict[int, str]]:
        """Replace the failed images by others; return the new results, and the images that failed again."""
        for index, reason in sorted(failures.items()):
            self._replace_id(index, reason, known.get(index))
        rows = np.array(sorted(failures), dtype=np.int64)
        others, failures, global_plan, local_plan = self._make_rows(rows, {}, _REPLACEMENT)
        self.global_plan = self.global_plan.with_images(rows, global_plan)
        if self.local_plan is not None:
            assert local_plan is not None
            self.local_plan = self.local_plan.with_images(rows, local_plan)
        return made.with_images(rows, others), failures

    def _replace_id(self, index: int, reason: str, known: Replacement | None) -> None:
        """Put another image at an index of the batch: the known replacement, or a drawn one."""
        source = self._context.source
        unreadable_id = int(self.sample_ids[index]) if known is None else known.unreadable_id
        new_id = self._draw_replacement(index) if known is None else known.replacement_id
        if new_id is None:
            raise self._nothing_readable()
        place = source.describe(unreadable_id)
        self.replacements.append(
            Replacement(index=index, unreadable_id=unreadable_id, replacement_id=new_id, reason=reason, place=place)
        )
        logger.warning(
            "step %d: %s is unreadable (%s) and is replaced by %s",
            self._request.step,
            place,
            reason,
            source.describe(new_id),
        )
        self.sample_ids[index] = new_id

    def _draw_replacement(self, index: int) -> int | None:
        """Draw an image for an index of the batch; None: no image is readable."""
        words = draw_stream(
            seed=self._context.seed,
            purpose=Purpose.REPLACEMENT,
            index=self._request.first_position + index,
            epoch=self._request.epoch,
            num_words=_REPLACEMENT_ATTEMPTS,
        )
        training_ids = self._context.training_ids
        candidates = training_ids[words % np.uint64(len(training_ids))].tolist()
        # Prefer an image that is new to the batch, then one that was not drawn for it yet, then any readable one.
        unreadable = {*self._unreadable, *self._request.quarantined_ids}
        for excluded in (self._tried, self._drawn | unreadable, unreadable):
            for candidate in candidates:
                if candidate not in excluded:
                    self._tried.add(candidate)
                    self._drawn.add(candidate)
                    return candidate
        return None

    def _nothing_readable(self) -> DataError:
        first, reason = next(iter(self._unreadable.items()))
        return DataError(
            f"no readable image was found, {len(self._unreadable)} were tried; the first, "
            f"{self._context.source.describe(first)}: {reason}. Check data.source, then start the run again"
        )
