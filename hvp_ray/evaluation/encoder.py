"""The encoder of a run, with the preprocessing that the run evaluated it with."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from hvp_ray.config import DataConfig, ViewsConfig
from hvp_ray.data.decode import decode_pixels
from hvp_ray.data.intensity import Intensities
from hvp_ray.data.source import open_source
from hvp_ray.errors import DataError, UnreadableImageError
from hvp_ray.evaluation.features import centre_crop
from hvp_ray.stream.reading import read_images
from hvp_ray.views.normalise import normalise_views

AnImage = str | Path | Image.Image | NDArray[np.uint8]
"""A file, an image of Pillow, or [H, W, C] pixels."""


class Encoder(nn.Module):
    """An encoder in evaluation mode. It maps normalised images [B, C, S, S] to features [B, D]."""

    def __init__(self, backbone: nn.Module, views: ViewsConfig, data: DataConfig) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        self._views = views
        self._data = data

    @property
    def size_px(self) -> int:
        """Height and width S of its images."""
        return self._views.global_views.size_px

    def forward(self, images: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch dim"]:
        """Return the features of prepared images."""
        features: Tensor = self.backbone(images)
        return features

    def prepare(self, image: AnImage) -> Float[Tensor, "channels size size"]:
        """Decode, resize, crop the centre and normalise one image, as the run's evaluation does.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        return self._normalised(np.stack([self._crop(image)]))[0]

    @torch.no_grad()
    def embed(
        self, images: str | Path | Sequence[AnImage], *, images_per_step: int = 64
    ) -> Float[NDArray[np.float32], "images dim"]:
        """Return the features of images in evaluation mode, in their order; the network's mode is restored.

        Args:
            images: images, or the source of a data set (as `data.source`, such as a folder) whose own order holds.
            images_per_step: images forwarded at once.

        Raises:
            DataError: the source cannot be used, or an image cannot be read.
        """
        device, was_training = next(self.backbone.parameters()).device, self.backbone.training
        parts, crops = [], self._crops(images)
        self.backbone.eval()
        try:
            while some := list(islice(crops, images_per_step)):
                parts.append(self(self._normalised(np.stack(some)).to(device)).float().cpu())
        finally:
            self.backbone.train(was_training)
        if not parts:
            raise DataError("there are no images to embed")
        return torch.cat(parts).numpy()

    def _crops(self, images: str | Path | Sequence[AnImage]) -> Iterator[NDArray[np.uint8]]:
        if isinstance(images, str | Path):
            source = open_source(str(images), self._data, in_order=True)
            for sample_id in range(source.num_samples):
                try:
                    yield self._decoded(read_images(source, [sample_id]).images[0])
                except UnreadableImageError as error:
                    raise DataError(f"{source.describe(sample_id)} cannot be read: {error}; remove it") from error
            return
        for image in images:
            try:
                yield self._crop(image)
            except UnreadableImageError as error:
                raise DataError(f"{image} cannot be read: {error}") from error

    def _crop(self, image: AnImage) -> NDArray[np.uint8]:
        if isinstance(image, str | Path):
            try:
                return self._decoded(Path(image).expanduser().read_bytes())
            except OSError as error:
                raise UnreadableImageError(str(error)) from error
        channels = self._data.channels
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                image = self._levels_of(image)
            elif channels in (1, 3):
                image = image.convert("L" if channels == 1 else "RGB")
        pixels = np.array(image)
        if pixels.ndim == 2 and channels == 1:
            pixels = pixels[..., None]
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
            expected = f"[H, W, {channels}]"
            raise UnreadableImageError(f"expected {expected} of uint8, got {list(pixels.shape)} of {pixels.dtype}")
        return centre_crop(np.ascontiguousarray(pixels), self._views)

    def _levels_of(self, image: Image.Image) -> NDArray[np.uint8]:
        if self._data.intensity_range is None:
            raise UnreadableImageError(
                f"an image of Pillow's mode {image.mode} has more than 8 bits per channel, and the run has no "
                f"data.intensity_range; scale it to uint8"
            )
        values = Intensities(values=np.asarray(image), kind=image.mode)
        return values.to_levels(self._data.intensity_range, grey_channels=self._data.channels)

    def _decoded(self, encoded: bytes) -> NDArray[np.uint8]:
        return centre_crop(decode_pixels(encoded, self._data), self._views)

    def _normalised(self, crops: NDArray[np.uint8]) -> Float[Tensor, "batch channels size size"]:
        return normalise_views(torch.from_numpy(crops), self._views)
