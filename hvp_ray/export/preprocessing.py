"""Code for model cards: how an image becomes the input of the encoder, as the run's evaluation does it.

The image is the file `image.png`. For other than one or three channels it is `image.npy` with [H, W, C] uint8, and for
runs on more than 8 bits per channel `image.npy` with [H, W, C] numbers in the units of the run's images.
"""

from hvp_ray.export.trained_encoder import TrainedEncoder

_PILLOW_MODES = {1: "L", 3: "RGB"}


def is_pillow_image(encoder: TrainedEncoder) -> bool:
    """Tell whether Pillow opens the images."""
    return encoder.num_channels in _PILLOW_MODES and encoder.intensity_range is None


def imports(encoder: TrainedEncoder) -> str:
    """Return the import that `open_code` and `torchvision_code` need."""
    return "from PIL import Image" if is_pillow_image(encoder) else "import numpy as np"


def open_code(encoder: TrainedEncoder) -> str:
    """Return the expression that opens the file, for transforms of torchvision and timm."""
    if is_pillow_image(encoder):
        return f'Image.open("image.png").convert("{_PILLOW_MODES[encoder.num_channels]}")'
    return f"torch.from_numpy({_levels(encoder)}).permute(2, 0, 1)"


def _levels(encoder: TrainedEncoder) -> str:
    """Return the expression for [H, W, C] uint8; see `data/intensity.py`."""
    if encoder.intensity_range is None:
        return 'np.load("image.npy")'
    black, white = encoder.intensity_range
    scaled = f'np.clip((np.load("image.npy").astype(np.float64) - {black!r}) / {white - black!r}, 0, 1)'
    return f"np.rint(255 * {scaled}).astype(np.uint8)"


def torchvision_code(encoder: TrainedEncoder) -> str:
    """Return statements that turn the file into `images`, by torchvision's transforms."""
    views = encoder.views
    convert = "        v2.PILToTensor(),\n" if is_pillow_image(encoder) else ""
    return f"""\
transform = v2.Compose(
    [
        v2.Resize({views.evaluation_resize_px}, interpolation=v2.InterpolationMode.{views.evaluation_interpolation.upper()}),
        v2.CenterCrop({encoder.size_px}),
{convert}        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean={views.mean}, std={views.std}),
    ]
)
images = transform({open_code(encoder)}).unsqueeze(0)
"""


def numpy_code(encoder: TrainedEncoder) -> str:
    """Return statements that turn the file into `images`, by Pillow and NumPy."""
    views, size_px = encoder.views, encoder.size_px
    bands = f"[{open_code(encoder)}]"
    join = "pixels = np.asarray(crops[0], np.float32) / 255"
    if is_pillow_image(encoder) and encoder.num_channels == 1:
        join = "pixels = np.asarray(crops[0], np.float32)[..., None] / 255"
    elif not is_pillow_image(encoder):
        bands = f"[Image.fromarray(band) for band in {_levels(encoder)}.transpose(2, 0, 1)]"
        join = "pixels = np.stack([np.asarray(crop, np.float32) for crop in crops], axis=-1) / 255"
    return f"""\
images = {bands}
scale = {views.evaluation_resize_px} / min(images[0].size)
width, height = int(images[0].width * scale), int(images[0].height * scale)
left, top = round((width - {size_px}) / 2), round((height - {size_px}) / 2)
resized = [image.resize((width, height), Image.Resampling.{views.evaluation_interpolation.upper()}) for image in images]
crops = [image.crop((left, top, left + {size_px}, top + {size_px})) for image in resized]
{join}
pixels = (pixels - np.float32({views.mean})) / np.float32({views.std})
images = pixels.transpose(2, 0, 1)[None]
"""
