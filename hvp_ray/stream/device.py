"""The host-to-device copy of a batch, started before the step needs it."""

import contextlib
import dataclasses
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.records import ViewBatch

BATCHES_ON_DEVICE = 2
"""The most batches on a trainer's device: the one in use, and the next."""

_RING_BATCHES = 3
"""Pinned staging buffers: one being filled, one being copied, one waiting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBatch(ViewBatch):
    """A batch whose pixels are also on the device once `wait` returns."""

    global_pixels: UInt8[Tensor, "views batch height width channels"]
    local_pixels: UInt8[Tensor, "local_views batch small_height small_width channels"] | None
    probe_pixels: UInt8[Tensor, "probe_views images height width channels"] | None = None
    copied: torch.cuda.Event | None = None
    """Recorded after the copy; None on a CPU."""

    def wait(self) -> None:
        """Make the current stream of the device wait for the copy; the host does not wait."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.global_pixels.device)
            stream.wait_event(self.copied)
            for pixels in (self.global_pixels, self.local_pixels, self.probe_pixels):
                if pixels is not None:
                    pixels.record_stream(stream)


class CopyToDevice:
    """Copies batches to a GPU through a ring of pinned buffers, on a stream of its own. On a CPU it copies nothing.

    One thread at a time may call it. Another thread, the trainer's, may call `release`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._released: torch.cuda.Event | None = None
        self._ring: list[_PinnedSlot] = []
        self._turn = 0

    def __call__(self, batch: ViewBatch) -> DeviceBatch:
        """Start the copy and return at once."""
        pixels, copied = [_as_tensor(views.pixels) for views in batch.groups.values()], None
        if self._stream is not None:
            pixels, copied = self._copy(pixels)
        on_host = {field.name: getattr(batch, field.name) for field in dataclasses.fields(ViewBatch)}
        of_group = dict(zip(batch.groups, pixels, strict=True))
        return DeviceBatch(
            **on_host,
            global_pixels=of_group["global"],
            local_pixels=of_group.get("local"),
            probe_pixels=of_group.get("probe"),
            copied=copied,
        )

    def current_device(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which the device is the current one of this thread; on a CPU it changes nothing."""
        return torch.cuda.device(self._device) if self._stream is not None else contextlib.nullcontext()

    def release(self) -> None:
        """Mark the trainer's batch as dropped.

        The next copy waits until the device has finished with that batch, so that it reuses the memory.
        """
        if self._stream is not None:
            released = torch.cuda.Event()
            released.record(torch.cuda.current_stream(self._device))
            self._released = released

    def _copy(self, host: list[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        assert self._stream is not None
        with torch.cuda.device(self._device):  # the current device is a setting of each thread
            if len(self._ring) < _RING_BATCHES:
                self._ring.append(_PinnedSlot())
            slot = self._ring[self._turn % _RING_BATCHES]
            self._turn += 1
            staged = slot.stage(host)
            if self._released is not None:
                self._released.synchronize()
            with torch.cuda.stream(self._stream):
                pixels = [tensor.to(self._device, non_blocking=True) for tensor in staged]
                slot.copied.record(self._stream)
                copied = torch.cuda.Event()
                copied.record(self._stream)
        return pixels, copied


class _PinnedSlot:
    """Pinned memory for one batch; grows to the largest batch and is reused."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._held: list[Tensor] = []
        self.copied = torch.cuda.Event()

    def stage(self, host: list[Tensor]) -> list[Tensor]:
        """Copy into pinned memory after the last copy out of it has ended; arrays that are pinned already are kept alive."""
        self.copied.synchronize()
        self._held = [tensor for tensor in host if tensor.is_pinned()]  # rendered by DALI in this process
        staged = []
        for index, tensor in enumerate(host):
            if tensor.is_pinned():
                staged.append(tensor)
                continue
            while index >= len(self._buffers):
                self._buffers.append(torch.empty(0, dtype=torch.uint8, pin_memory=True))
            if self._buffers[index].numel() < tensor.numel():
                self._buffers[index] = torch.empty(tensor.numel(), dtype=torch.uint8, pin_memory=True)
            view = self._buffers[index][: tensor.numel()].view(tensor.shape)
            staged.append(view.copy_(tensor))
        return staged


def _as_tensor(array: NDArray[np.uint8]) -> Tensor:
    with warnings.catch_warnings():
        # Arrays from the object store are read-only; nothing writes to these tensors.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        return torch.from_numpy(array)
