"""Colour operations on float32 pixels [H, W, C] in levels 0 to 255, as torchvision defines them, in place.

Saturation, hue and grey need RGB; `draw_plan` plans none of them for other channels.

Every operation clamps to [0, 255] if its factor can leave that range, as torchvision does. Pixels are converted from uint8
once and rounded once, so the result is exact to half a level. torchvision on uint8 and PIL instead cut off the fraction
after each operation, which darkens by about half a level each time.

The caller reuses the arrays for each view: fresh memory of this size costs as much as the arithmetic. All OpenCV functions
used here give the same bits with AVX2 and with AVX-512, with and without Intel's primitives. cv2.transform to three
channels and cv2.COLOR_RGB2GRAY do not.

Source: torchvision.transforms.v2.functional (_color.py). The hue is shifted in HSV, as torchvision and PIL do. A
rotation about the grey axis differs from that by 5 levels on average at 0.1 turn.
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

GREY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R 601-2, the digits that torchvision uses)."""

LEVEL_MAX = 255.0
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Codes in `ViewPlan.jitter_order`."""

_WEIGHTS_ROW = np.array([GREY_WEIGHTS], dtype=np.float32)

FloatImage = NDArray[np.float32]


def update_brightness(pixels: FloatImage, factor: float) -> None:
    """Multiply by `factor` and clamp."""
    np.multiply(pixels, np.float32(factor), out=pixels)
    if factor > 1.0:
        cv2.threshold(pixels, LEVEL_MAX, LEVEL_MAX, cv2.THRESH_TRUNC, dst=pixels)


def update_contrast(pixels: FloatImage, factor: float) -> None:
    """Blend with the mean grey of the whole view (the mean, if it is not RGB) and clamp: factor * x + (1 - factor) * mean."""
    if pixels.shape[2] == 3:
        red, green, blue, _ = cv2.mean(pixels)
        mean_grey = GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue
    else:
        mean_grey = float(pixels.mean(dtype=np.float64))
    cv2.addWeighted(pixels, factor, pixels, 0.0, (1.0 - factor) * mean_grey, dst=pixels)
    if factor > 1.0:
        _clamp(pixels)


def update_saturation(pixels: FloatImage, factor: float, *, spare: FloatImage) -> None:
    """Blend each pixel with its own grey and clamp: factor * x + (1 - factor) * grey(x).

    Args:
        pixels: [H, W, 3].
        factor: 1 changes nothing.
        spare: [H, W, 3]; overwritten.
    """
    cv2.cvtColor(grey_of(pixels), cv2.COLOR_GRAY2RGB, dst=spare)
    cv2.addWeighted(pixels, factor, spare, 1.0 - factor, 0.0, dst=pixels)
    if factor > 1.0:
        _clamp(pixels)


def update_hue(pixels: FloatImage, turns: float, *, spare: FloatImage) -> None:
    """Shift the hue in HSV by `turns` of the colour circle; the result stays in [0, 255].

    Args:
        pixels: [H, W, 3].
        turns: 0 changes nothing.
        spare: [H, W, 3]; overwritten.
    """
    cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV, dst=spare)
    cv2.add(spare, (360.0 * (turns % 1.0), 0.0, 0.0, 0.0), dst=spare)
    cv2.cvtColor(spare, cv2.COLOR_HSV2RGB, dst=pixels)


def update_jitter(
    pixels: FloatImage,
    *,
    order: list[int],
    brightness: float,
    contrast: float,
    saturation: float,
    hue_turns: float,
    spare: FloatImage,
) -> None:
    """Apply the four operations in the order given; neutral ones are skipped.

    Args:
        pixels: [H, W, C].
        order: the four codes, each once.
        brightness, contrast, saturation: factors.
        hue_turns: shift of the hue.
        spare: [H, W, C]; overwritten.
    """
    for operation in order:
        if operation == BRIGHTNESS and brightness != 1.0:
            update_brightness(pixels, brightness)
        elif operation == CONTRAST and contrast != 1.0:
            update_contrast(pixels, contrast)
        elif operation == SATURATION and saturation != 1.0:
            update_saturation(pixels, saturation, spare=spare)
        elif operation == HUE and hue_turns != 0.0:
            update_hue(pixels, hue_turns, spare=spare)


def grey_of(pixels: FloatImage) -> FloatImage:
    """Return the grey of each pixel, [H, W]."""
    grey: FloatImage = cv2.transform(pixels, _WEIGHTS_ROW)
    return grey


def round_to_levels(pixels: FloatImage, *, out: NDArray[np.uint8]) -> None:
    """Round to the nearest level (ties to even) into `out`, of the same shape: [H, W, C], or [H, W]."""
    cv2.convertScaleAbs(pixels, dst=out)


def solarize(pixels: NDArray[np.uint8], *, out: NDArray[np.uint8]) -> None:
    """Invert the values of 128 and above into `out`: min(x, 255 - x)."""
    np.bitwise_not(pixels, out=out)
    np.minimum(pixels, out, out=out)


def _clamp(pixels: FloatImage) -> None:
    torch.from_numpy(pixels).clamp_(0.0, LEVEL_MAX)  # takes half the time of NumPy's clip
