"""Code for model cards: how an image becomes the input of the encoder, as the run's evaluation does it."""

from hvp_ray.export.trained_encoder import TrainedEncoder


def torchvision_code(encoder: TrainedEncoder) -> str:
    """Return statements that turn the file `image.png` into `images`, by torchvision's transforms."""
    views = encoder.views
    return f"""\
transform = v2.Compose(
    [
        v2.Resize({views.evaluation_resize_px}, interpolation=v2.InterpolationMode.{views.evaluation_interpolation.upper()}),
        v2.CenterCrop({encoder.size_px}),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean={views.mean}, std={views.std}),
    ]
)
images = transform(Image.open("image.png").convert("RGB")).unsqueeze(0)
"""


def numpy_code(encoder: TrainedEncoder) -> str:
    """Return statements that turn the file `image.png` into `images`, by Pillow and NumPy."""
    views, size_px = encoder.views, encoder.size_px
    return f"""\
image = Image.open("image.png").convert("RGB")
scale = {views.evaluation_resize_px} / min(image.size)
size = (int(image.width * scale), int(image.height * scale))
image = image.resize(size, Image.Resampling.{views.evaluation_interpolation.upper()})
left, top = round((image.width - {size_px}) / 2), round((image.height - {size_px}) / 2)
pixels = np.asarray(image.crop((left, top, left + {size_px}, top + {size_px})), np.float32) / 255
pixels = (pixels - np.float32({views.mean})) / np.float32({views.std})
images = pixels.transpose(2, 0, 1)[None]
"""
