"""The views of a step on the device, as bytes: split into parts, gathered by index, and normalised where they are used."""

from dataclasses import dataclass

from jaxtyping import Bool, UInt8
from torch import Tensor

from hvp_ray.config import RunConfig
from hvp_ray.host_to_device import to_device
from hvp_ray.methods.method import ViewTensors
from hvp_ray.selection import Selection, gather_views
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.views.normalise import normalise_views


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelViews:
    """What belongs to some views of B images."""

    global_pixels: UInt8[Tensor, "views batch height width 3"]
    local_pixels: UInt8[Tensor, "local_views batch small_height small_width 3"] | None
    masks: Bool[Tensor, "views batch patch_rows patch_columns"] | None

    @staticmethod
    def of(batch: DeviceBatch) -> "PixelViews":
        """Return the candidates of a batch."""
        mask = batch.batch.global_views.plan.mask
        device = batch.global_pixels.device
        return PixelViews(
            global_pixels=batch.global_pixels,
            local_pixels=batch.local_pixels,
            masks=None if mask is None else to_device(mask.copy(), device),
        )

    def gather(self, selection: Selection) -> "PixelViews":
        """Return the chosen views; a mask goes with its view."""
        local_pixels = None
        if self.local_pixels is not None and selection.local_indices is not None:
            local_pixels = gather_views(self.local_pixels, selection.local_indices)
        return PixelViews(
            global_pixels=gather_views(self.global_pixels, selection.view_indices),
            local_pixels=local_pixels,
            masks=None if self.masks is None else gather_views(self.masks, selection.view_indices),
        )

    def split(self, num_parts: int) -> list["PixelViews"]:
        """Return parts of equal numbers of images."""
        images_per_part = self.global_pixels.shape[1] // num_parts
        slices = [slice(part * images_per_part, (part + 1) * images_per_part) for part in range(num_parts)]
        return [
            PixelViews(
                global_pixels=self.global_pixels[:, images],
                local_pixels=None if self.local_pixels is None else self.local_pixels[:, images],
                masks=None if self.masks is None else self.masks[:, images],
            )
            for images in slices
        ]

    def normalised(self, config: RunConfig) -> ViewTensors:
        """Return what the networks see."""
        views = config.views
        return ViewTensors(
            global_views=normalise_views(self.global_pixels, views),
            local_views=None if self.local_pixels is None else normalise_views(self.local_pixels, views),
            masks=self.masks,
            max_masked_patches=None if views.masks is None else views.masks.max_cells(views.global_views.size_px),
        )
