"""Images that kill a decoder are found in a batch, and among those that would replace damaged ones."""

import numpy as np

from hvp_ray.config import DataConfig, TransformConfig
from hvp_ray.records import BatchRequest
from hvp_ray.stream.quarantine import find_crashing_ids
from hvp_ray.stream.render_batch import RenderContext, render_batch
from hvp_ray.views.render_cpu import CpuRenderer
from tests.helpers import encode, views_config
from tests.unit.stream.test_render_batch import ListSource

DECODER = "tests.unit.stream.dying_decoder:decode_or_die"
VIEWS = views_config(16, TransformConfig())


def _context(*, damaged: tuple[int, ...] = (), crashing: tuple[int, ...] = ()) -> RenderContext:
    images = [encode(np.full((20, 24, 3), 5 * i, np.uint8)) for i in range(40)]
    for index in damaged:
        images[index] = b"damaged"
    for index in crashing:
        images[index] += b"crash"
    return RenderContext(
        seed=3,
        source=ListSource(images),
        training_ids=np.arange(len(images)),
        data=DataConfig(source="list"),
        views=VIEWS,
        renderer=CpuRenderer(VIEWS, max_image_pixels=10**6),
    )


def _request(quarantined_ids: tuple[int, ...] = ()) -> BatchRequest:
    return BatchRequest(
        step=1,
        epoch=0,
        first_position=8,
        sample_ids=np.arange(8, dtype=np.int64),
        num_views=2,
        quarantined_ids=quarantined_ids,
    )


def _find(context: RenderContext, request: BatchRequest) -> list[int]:
    return find_crashing_ids(context, request, decoder=DECODER)


def test_crashing_images_of_a_batch_are_found_and_nothing_else_is() -> None:
    context = _context(damaged=(1, 2), crashing=(3, 6, 30))
    assert _find(context, _request()) == [3, 6]
    assert _find(context, _request(quarantined_ids=(3, 6))) == []


def test_crashing_image_that_would_replace_a_damaged_one_is_found() -> None:
    """It is in nobody's batch; after its quarantine the next one in line takes the place, which crashes too."""
    damaged = _context(damaged=(2, 5))
    replaced_by = {r.index: r.replacement_id for r in render_batch(damaged, _request()).replacements}
    first = replaced_by[5]
    context = _context(damaged=(2, 5), crashing=(first,))
    assert _find(context, _request()) == [first]

    second = int(render_batch(context, _request(quarantined_ids=(first,))).sample_ids[5])
    assert second not in (*range(8), first, replaced_by[2])
    context = _context(damaged=(2, 5), crashing=(first, second))
    assert _find(context, _request(quarantined_ids=(first,))) == [second]


def test_quarantine_and_damage_of_an_image_give_the_same_batch() -> None:
    """Of the batch that has it, and of one that it would be drawn for."""
    replacement = int(render_batch(_context(damaged=(2,)), _request()).sample_ids[2])
    for unreadable in (4, replacement):
        damaged = render_batch(_context(damaged=(2, unreadable)), _request())
        quarantined = render_batch(_context(damaged=(2,)), _request(quarantined_ids=(unreadable,)))
        assert damaged.sample_ids.tolist() == quarantined.sample_ids.tolist()
        assert np.array_equal(damaged.global_views.pixels, quarantined.global_views.pixels)
