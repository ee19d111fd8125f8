"""ONNX: one file, for images of the run's evaluation size and any number of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hvp_ray.export import preprocessing
from hvp_ray.export.trained_encoder import TrainedEncoder
from hvp_ray.extras import require_extra

MODEL = "model.onnx"
_PURPOSE = "--to onnx"
_MAX_ONE_FILE_BYTES = 2**30
"""Weights above this are written beside the model; a file of ONNX holds less than 2 GiB."""


def write(encoder: TrainedEncoder, folder: Path) -> None:
    """Write model.onnx: `images` [batch, C, S, S], float32, normalised -> `features` [batch, D]."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require_extra(module, extra="export", purpose=_PURPOSE)
    network = encoder.at_one_size()
    num_bytes = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    torch.onnx.export(
        network,
        (torch.zeros(2, encoder.num_channels, encoder.size_px, encoder.size_px),),
        folder / MODEL,
        dynamo=True,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=num_bytes > _MAX_ONE_FILE_BYTES,
        verbose=False,
    )


def load(_encoder: TrainedEncoder, folder: Path) -> Callable[[Tensor], Tensor]:
    """Load a written file in ONNX Runtime, on the CPU."""
    onnxruntime = require_extra("onnxruntime", extra="export", purpose=_PURPOSE)
    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])

    def embed(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    return embed


def describe_loading(encoder: TrainedEncoder, folder_code: str) -> str:
    """Return the section of the model card on loading."""
    return f"""\
`images` is [batch, {encoder.num_channels}, {encoder.size_px}, {encoder.size_px}], float32, of any batch size.

```python
import numpy as np
import onnxruntime
from PIL import Image

{folder_code}
encoder = onnxruntime.InferenceSession(f"{{folder}}/{MODEL}")
{preprocessing.numpy_code(encoder)}features = encoder.run(["features"], {{"images": images}})[0]
```
"""
