"""Small arrays of the host on their way to the trainer's device; pixels go through `stream/device.py`."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Shaped[Tensor, "..."]:
    """Copy an array to a device; on the way to a GPU through pinned memory, so that the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
