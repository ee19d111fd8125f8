"""The host-to-device copy of small arrays; `stream/device.py` copies pixels."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Shaped[Tensor, "..."]:
    """Copy an array to a device; the copy to a GPU goes through pinned memory, so the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
