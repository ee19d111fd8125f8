"""The views of a step on the device, as bytes: split into parts, gathered by index, and normalised when they are used."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from hvp_ray.config import SelectionConfig, ViewsConfig
from hvp_ray.host_to_device import to_device
from hvp_ray.methods.method import ViewTensors
from hvp_ray.records import Views
from hvp_ray.selection import Reusable, Selection, gather_reusable, gather_views
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.views.downscale import downscale_views
from hvp_ray.views.normalise import normalise_views


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelViews:
    """Pixels, masks and reusable results of some views of B images."""

    global_pixels: UInt8[Tensor, "views batch height width channels"]
    local_pixels: UInt8[Tensor, "local_views batch small_height small_width channels"] | None
    masks: Bool[Tensor, "views batch patch_rows patch_columns"] | None
    reusable: dict[str, Float[Tensor, "views batch *rest"]] = field(default_factory=dict)
    """Results of scoring for these views; see `CandidateScores.reusable`."""

    @staticmethod
    def of(batch: DeviceBatch) -> "PixelViews":
        """Return the candidates of a batch."""
        return PixelViews(
            global_pixels=batch.global_pixels,
            local_pixels=batch.local_pixels,
            masks=_masks_on(batch.global_pixels.device, batch.global_views),
        )

    @staticmethod
    def of_probes(batch: DeviceBatch) -> "PixelViews":
        """Return the probe views of a batch, which has some."""
        assert batch.probe_views is not None and batch.probe_pixels is not None
        return PixelViews(
            global_pixels=batch.probe_pixels,
            local_pixels=None,
            masks=_masks_on(batch.probe_pixels.device, batch.probe_views),
        )

    def gather(self, selection: Selection, reusable: Reusable | None = None) -> "PixelViews":
        """Return the chosen views; a mask goes with its view, and so does what scoring left for training."""
        local_pixels = None
        if self.local_pixels is not None and selection.local_indices is not None:
            local_pixels = gather_views(self.local_pixels, selection.local_indices)
        return PixelViews(
            global_pixels=gather_views(self.global_pixels, selection.view_indices),
            local_pixels=local_pixels,
            masks=None if self.masks is None else gather_views(self.masks, selection.view_indices),
            reusable=gather_reusable(reusable or {}, selection),
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
                # torch sums contiguous memory and slices in different orders; without reuse the memory is contiguous.
                reusable={name: values[:, images].contiguous() for name, values in self.reusable.items()},
            )
            for images in slices
        ]

    def for_scoring(self, selection: SelectionConfig, views: ViewsConfig, *, patch_px: int) -> "PixelViews":
        """Return the views at `selection.scoring_resolution_px`, antialiased; None there leaves them unchanged.

        Local views shrink by the same factor, to the nearest multiple of `patch_px`. A patch of a smaller mask is masked
        if at least half of its area was.
        """
        resolution_px, size_px = selection.scoring_resolution_px, views.global_views.size_px
        if resolution_px is None or resolution_px == size_px:
            return self
        local_pixels, masks = self.local_pixels, self.masks
        if local_pixels is not None:
            patches = max(1, round(local_pixels.shape[-2] * resolution_px / size_px / patch_px))
            local_pixels = downscale_views(local_pixels, patches * patch_px)
        if masks is not None:
            grid = resolution_px // patch_px
            masks = F.adaptive_avg_pool2d(masks.float(), (grid, grid)) >= 0.5
        return replace(
            self,
            global_pixels=downscale_views(self.global_pixels, resolution_px),
            local_pixels=local_pixels,
            masks=masks,
        )

    def normalised(self, views: ViewsConfig) -> ViewTensors:
        """Return the input of the networks."""
        return ViewTensors(
            global_views=normalise_views(self.global_pixels, views),
            local_views=None if self.local_pixels is None else normalise_views(self.local_pixels, views),
            masks=self.masks,
            max_masked_patches=self._max_masked_patches(views),
            reusable=self.reusable,
            alternating=views.slots_keep_transforms,
        )

    def _max_masked_patches(self, views: ViewsConfig) -> int | None:
        """Return the most patches that a mask can have; None: no masks, or of a grid that the config does not bound."""
        if self.masks is None or views.masks is None:
            return None
        size_px = views.global_views.size_px
        return views.masks.max_cells(size_px) if self.masks.shape[-1] == views.masks.grid(size_px) else None


def _masks_on(device: torch.device, views: Views) -> Tensor | None:
    return None if views.plan.mask is None else to_device(views.plan.mask.copy(), device)
