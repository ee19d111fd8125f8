"""Images cut to what their views use: the smallest box, nothing lost, failures where decoding fails."""

import dataclasses

import numpy as np

from hvp_ray.config import DataConfig
from hvp_ray.data.decode import decode_rgb
from hvp_ray.randomness import Purpose
from hvp_ray.records import DecodedImages, ViewPlan
from hvp_ray.views.decoded import decode_used, used_boxes
from hvp_ray.views.plan import draw_plan
from tests.helpers import encode, photograph_like, views_config

DATA = DataConfig(source="list")


def _plan(crops: list[list[tuple[int, int, int, int]]]) -> ViewPlan:
    """A plan of these crops [V][B]: top, left, height, width."""
    shape = (len(crops), len(crops[0]))
    plan = draw_plan(
        seed=0,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=np.arange(shape[1]),
        image_sizes=(np.full(shape[1], 50, np.int32), np.full(shape[1], 60, np.int32)),
        num_views=shape[0],
        group=views_config().global_views,
    )
    edges = np.array(crops, np.int32)
    return dataclasses.replace(plan, top=edges[..., 0], left=edges[..., 1], height=edges[..., 2], width=edges[..., 3])


def test_box_is_the_smallest_around_all_crops_of_an_image() -> None:
    of_globals = _plan([[(2, 10, 5, 6), (0, 0, 50, 60)], [(4, 3, 9, 4), (1, 1, 1, 1)]])
    of_locals = _plan([[(1, 12, 2, 20), (7, 8, 2, 2)]])
    assert used_boxes([of_globals]).tolist() == [[2, 3, 11, 13], [0, 0, 50, 60]]
    assert used_boxes([of_globals, of_locals]).tolist() == [[1, 3, 12, 29], [0, 0, 50, 60]]


def test_boxes_hold_the_pixels_of_the_decoded_images(generator: np.random.Generator) -> None:
    images = [encode(photograph_like(generator, 50, 60), "JPEG") for _ in range(3)]
    plan = _plan([[(2, 10, 5, 6), (0, 0, 50, 60), (49, 59, 1, 1)]])
    decoded = decode_used(images, plan, None, data=DATA)
    assert decoded.failures == {}
    assert decoded.pixels.nbytes == (5 * 6 + 50 * 60 + 1) * 3
    for image, found, (top, left, height, width) in zip(images, decoded.images(), decoded.boxes.tolist(), strict=True):
        whole = decode_rgb(image, max_pixels=DATA.max_image_pixels)
        assert np.array_equal(found, whole[top : top + height, left : left + width])


def test_damaged_image_is_reported_and_its_box_is_empty(generator: np.random.Generator) -> None:
    image = encode(photograph_like(generator, 50, 60), "JPEG")
    decoded = decode_used([image, image[:400]], _plan([[(0, 0, 8, 9), (0, 0, 8, 9)]]), None, data=DATA)
    assert list(decoded.failures) == [1]
    assert decoded.images()[0].any()
    assert not decoded.images()[1].any()


def test_images_are_replaced_by_others_of_other_sizes() -> None:
    def filled(*values_and_shapes: tuple[int, int, int]) -> DecodedImages:
        parts = [np.full(height * width * 3, value, np.uint8) for value, height, width in values_and_shapes]
        boxes = np.array([[0, 0, height, width] for _, height, width in values_and_shapes], np.int32)
        return DecodedImages(pixels=np.concatenate(parts), boxes=boxes, channels=3, failures={0: "damaged"})

    replaced = filled((1, 2, 3), (2, 1, 1), (3, 4, 2)).with_images(np.array([0, 2]), filled((7, 5, 5), (8, 1, 2)))
    assert [image.shape for image in replaced.images()] == [(5, 5, 3), (1, 1, 3), (1, 2, 3)]
    assert [int(image[0, 0, 0]) for image in replaced.images()] == [7, 2, 8]
    assert replaced.pixels.nbytes == (25 + 1 + 2) * 3
    assert replaced.failures == {0: "damaged"}
