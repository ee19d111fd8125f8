"""Fine-tuning learns coloured squares; crops are torchvision's."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as T

from hvp_ray.config import BackboneConfig
from hvp_ray.errors import ConfigError, ShapeError, TrainingError
from hvp_ray.evaluation.finetune import FineTuneResult, FineTuneSettings, LabelledPixels, crop_and_flip, fine_tune
from hvp_ray.methods.backbones import build_backbone
from tests.helpers import NEUTRAL, views_config

VIEWS = views_config(8)
CPU = torch.device("cpu")


def _squares(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    labels = (np.arange(count) % 3).astype(np.int64)
    pixels = generator.integers(0, 150, (count, 8, 8, 3))
    pixels[np.arange(count), :, :, labels] += 60
    return pixels.astype(np.uint8), labels


def _backbone() -> torch.nn.Module:
    return build_backbone(BackboneConfig(name="resnet10", stem="cifar", channels=(4, 4, 8, 8)))


def _tune(backbone: torch.nn.Module, **options: object) -> FineTuneResult:
    generator = np.random.default_rng(0)
    train, test = LabelledPixels(*_squares(generator, 96)), LabelledPixels(*_squares(generator, 60))
    settings = {"epochs": 12, "images_per_step": 32, "learning_rate_per_256": 0.05} | options
    return fine_tune(backbone, train, test, VIEWS, FineTuneSettings(**settings), CPU)  # type: ignore[arg-type]


def test_fine_tuning_learns_and_leaves_the_encoder_and_the_generator_alone() -> None:
    backbone = _backbone().eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    generator_before = torch.get_rng_state()
    result = _tune(backbone)
    assert result.accuracy > 0.8
    assert result.accuracy == result.correct.mean()
    assert result.correct.shape == (60,)
    assert len(result.losses) == 12
    assert result.losses[-1] < result.losses[0]
    assert not backbone.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert torch.equal(generator_before, torch.get_rng_state())


def test_fine_tuning_is_a_function_of_its_seed() -> None:
    backbone = _backbone()
    first, second = _tune(backbone, epochs=2), _tune(backbone, epochs=2)
    assert first.losses == second.losses
    assert first.losses != _tune(backbone, epochs=2, seed=1).losses


def test_diverged_fine_tuning_is_an_error_and_no_accuracy() -> None:
    with pytest.raises(TrainingError, match="fine-tuning diverged: its .*; use a lower --learning_rate than 1e\\+30"):
        _tune(_backbone(), learning_rate_per_256=1e30)


def test_crop_of_everything_changes_nothing_and_flip_is_a_flip() -> None:
    images = torch.rand(4, 3, 8, 8)
    whole = dataclasses.replace(NEUTRAL, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    torch.testing.assert_close(crop_and_flip(images, whole, torch.Generator()), images)
    flipped = crop_and_flip(images, dataclasses.replace(whole, flip_probability=1.0), torch.Generator())
    torch.testing.assert_close(flipped, images.flip(-1))


def test_crop_is_that_of_torchvision() -> None:
    """A quarter of a 16 px image is a box of 8 px; the uniform numbers give its position."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    image = torch.stack([x, y, x * y / 16])[None]
    quarter = dataclasses.replace(NEUTRAL, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    found = crop_and_flip(image, quarter, torch.Generator().manual_seed(3))
    uniform = torch.rand(1, 5, generator=torch.Generator().manual_seed(3))[0]
    left, top = 8 * float(uniform[2]), 8 * float(uniform[3])
    # Inside, the ramps are linear, so the centre of output pixel i lies at left + (i + 0.5) / 2 - 0.5.
    expected = left + (torch.arange(16.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(found[0, 0, 8, 2:14], expected[2:14], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found[0, 1, 2:14, 8], (top + (torch.arange(16.0) + 0.5) / 2 - 0.5)[2:14], atol=1e-4, rtol=1e-4
    )
    # And a box on whole pixels is torchvision's, up to the border, which torchvision cuts before it resizes.
    rounded = T.resized_crop(image, round(top), round(left), 8, 8, [16, 16], antialias=False)
    assert (found[..., 2:14, 2:14] - rounded[..., 2:14, 2:14]).abs().max() < 1.0


def test_wrong_input_is_refused() -> None:
    backbone, (pixels, labels) = _backbone(), _squares(np.random.default_rng(0), 6)
    images, settings = LabelledPixels(pixels, labels), FineTuneSettings()
    with pytest.raises(ShapeError, match="expected two training images"):
        fine_tune(backbone, LabelledPixels(pixels[:1], labels[:1]), images, VIEWS, settings, CPU)
    with pytest.raises(ShapeError, match="unlabelled"):
        fine_tune(backbone, LabelledPixels(pixels, labels - 1), images, VIEWS, settings, CPU)
    with pytest.raises(ConfigError, match="epochs=0"):
        FineTuneSettings(epochs=0)
