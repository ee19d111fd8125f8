"""Colour operations on float32 pixels [H, W, 3] in levels 0 to 255, as torchvision defines them.

Every operation clamps to [0, 255], as torchvision does, but nothing is rounded in between: pixels are converted
from uint8 once and rounded once, so the result is the exact chain to half a level, where torchvision on uint8 and
PIL cut off the fraction after each operation (about half a level darker each time).

Source: torchvision.transforms.v2.functional (_color.py). The hue is shifted in HSV, as torchvision and PIL do; a
rotation about the grey axis differs from that by 5 levels on average at 0.1 turn.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

GREY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R 601-2, the digits that torchvision uses)."""

LEVEL_MAX = 255.0
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Codes in `ViewPlan.jitter_order`."""

_WEIGHTS_ROW = np.array([GREY_WEIGHTS], dtype=np.float32)
_WEIGHTS_MATRIX = np.repeat(_WEIGHTS_ROW, 3, axis=0)
_IDENTITY = np.eye(3, dtype=np.float32)

FloatImage = NDArray[np.float32]


def adjust_brightness(pixels: FloatImage, factor: float) -> FloatImage:
    """Multiply by `factor` and clamp."""
    return _clamp(pixels * np.float32(factor))


def adjust_contrast(pixels: FloatImage, factor: float) -> FloatImage:
    """Blend with the mean grey of the whole view and clamp: factor * x + (1 - factor) * mean."""
    mean_grey = float(np.dot(cv2.mean(pixels)[:3], GREY_WEIGHTS))
    return _clamp(pixels * np.float32(factor) + np.float32((1.0 - factor) * mean_grey))


def adjust_saturation(pixels: FloatImage, factor: float) -> FloatImage:
    """Blend each pixel with its own grey and clamp: factor * x + (1 - factor) * grey(x)."""
    matrix = np.float32(factor) * _IDENTITY + np.float32(1.0 - factor) * _WEIGHTS_MATRIX
    return _clamp(_transform(pixels, matrix))


def adjust_hue(pixels: FloatImage, turns: float) -> FloatImage:
    """Shift the hue in HSV by `turns` of the colour circle."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv = cv2.add(hsv, (360.0 * (turns % 1.0), 0.0, 0.0, 0.0))
    return _clamp(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def to_grey(pixels: FloatImage) -> FloatImage:
    """Replace each pixel by its grey, in all three channels."""
    return _transform(pixels, _WEIGHTS_MATRIX)


def round_to_levels(pixels: FloatImage) -> NDArray[np.uint8]:
    """Round to the nearest level (ties to even)."""
    return cv2.convertScaleAbs(pixels).reshape(pixels.shape)


def solarize(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Invert the values of 128 and above."""
    return np.where(pixels >= 128, 255 - pixels, pixels).astype(np.uint8)


def jitter(
    pixels: FloatImage,
    *,
    order: list[int],
    brightness: float,
    contrast: float,
    saturation: float,
    hue_turns: float,
) -> FloatImage:
    """Apply the four operations in the order given; neutral ones are skipped."""
    for operation in order:
        if operation == BRIGHTNESS and brightness != 1.0:
            pixels = adjust_brightness(pixels, brightness)
        elif operation == CONTRAST and contrast != 1.0:
            pixels = adjust_contrast(pixels, contrast)
        elif operation == SATURATION and saturation != 1.0:
            pixels = adjust_saturation(pixels, saturation)
        elif operation == HUE and hue_turns != 0.0:
            pixels = adjust_hue(pixels, hue_turns)
    return pixels


def _clamp(pixels: FloatImage) -> FloatImage:
    clamped: FloatImage = np.clip(pixels, 0.0, LEVEL_MAX, out=pixels)
    return clamped


def _transform(pixels: FloatImage, matrix: FloatImage) -> FloatImage:
    transformed: FloatImage = cv2.transform(pixels, matrix)
    return transformed
