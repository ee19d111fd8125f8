"""Network inputs: the formula to the bit, and the layout that convolutions are fast in."""

import torch

from hvp_ray.views.normalise import normalise_views
from tests.helpers import views_config


def test_one_pass_is_the_formula_to_the_bit_and_channels_last() -> None:
    views = views_config(16)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(18)[: 2 * 3 * 16 * 16 * 3].view(2, 3, 16, 16, 3)
    mean, std = torch.tensor(views.mean) * 255.0, torch.tensor(views.std) * 255.0
    inputs = normalise_views(pixels, views)
    assert torch.equal(inputs, ((pixels.float() - mean) / std).movedim(-1, -3))
    assert inputs.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
