"""Pool sizes computed by hand from service times, and service times of real images."""

import numpy as np
import pytest

from hvp_ray.costs.pool_size import recommend_ship, size_pool
from hvp_ray.costs.prefetch import batch_bytes
from hvp_ray.costs.service_times import ServiceTimes, measure_service_times
from hvp_ray.errors import UnreadableImageError
from tests.helpers import encode, photograph_like, tiny_config

TIMES = ServiceTimes(
    num_images=64,
    whole_seconds=0.0048,
    decode_seconds=0.0020,
    finish_seconds=0.0030,
    encoded_bytes=110_000.0,
    shipped_pixel_bytes=450_000.0,
    view_bytes=600_000.0,
)


def test_pool_for_views_and_for_pixels_by_hand() -> None:
    config = tiny_config("x", training={"images_per_step": 1024}, cluster={"num_trainers": 4})
    views = size_pool(config, TIMES, images_per_second=4000.0, ship="views")
    assert views.num_view_workers == 24  # 1.2 x 4,000 x 0.0048 = 23.04
    assert views.finishers_per_trainer == 0
    assert views.link_bytes_per_second == 1000 * 600_000
    assert views.batches_in_flight == 8  # 24 / 4 + 2
    assert views.store_bytes == 9 * 256 * 600_000
    pixels = size_pool(config, TIMES, images_per_second=4000.0, ship="pixels")
    assert pixels.num_view_workers == 10  # 1.2 x 4,000 x 0.0020 = 9.6
    assert pixels.finishers_per_trainer == 4  # 1.2 x 1,000 x 0.0030 = 3.6
    assert pixels.link_bytes_per_second == 1000 * 450_000
    assert pixels.batches_in_flight == 9  # 10 / 4, rounded up, + 4 + 2
    assert pixels.store_bytes == 10 * 256 * 1_050_000


@pytest.mark.parametrize(
    ("link", "chosen"), [(1e9, "views"), (0.75e9, "views"), (0.74e9, "pixels"), (0.57e9, "pixels"), (0.5e9, None)]
)
def test_views_are_recommended_if_they_fit_else_pixels_else_nothing(link: float, chosen: str | None) -> None:
    """0.6 and 0.45 GB/s are needed; 80 % of the link can be used."""
    config = tiny_config("x")
    sizes = [size_pool(config, TIMES, images_per_second=1000.0, ship=ship) for ship in ("views", "pixels")]
    assert recommend_ship(sizes, link) == chosen


def test_service_times_of_both_stages_and_bytes(generator: np.random.Generator) -> None:
    config = tiny_config("x", recipe="dino-digits")
    images = [encode(photograph_like(generator, 60, 80), "JPEG") for _ in range(4)]
    times = measure_service_times(config, [*images, b"damaged"], seconds=0.05)
    assert times.num_images == 4
    assert times.encoded_bytes == sum(map(len, images)) / 4
    assert times.view_bytes == batch_bytes(config) / 16
    assert 0 < times.shipped_pixel_bytes <= 60 * 80 * 3
    assert min(times.whole_seconds, times.decode_seconds, times.finish_seconds) > 0.0
    with pytest.raises(UnreadableImageError):
        measure_service_times(config, [b"damaged"])
