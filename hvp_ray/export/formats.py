"""The table of formats."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hvp_ray.export import onnx_file, timm_folder, torchvision_weights, transformers_folder
from hvp_ray.export.trained_encoder import TrainedEncoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How an encoder is written for a library."""

    library: str
    """Name of the library on the Hugging Face hub."""
    tolerance: float
    """Largest allowed difference between features of the library and ours, relative to the largest feature, if that is
    above 1."""
    write: Callable[[TrainedEncoder, Path], None]
    """Writes the encoder into an empty folder; raises ConfigError if the library has no such network."""
    load: Callable[[TrainedEncoder, Path], Callable[[Tensor], Tensor]]
    """Loads a written folder by means of the library, as a function from normalised images to features."""
    describe_loading: Callable[[TrainedEncoder, str], str]
    """Returns the section of the model card on loading. The code begins with the given line, which sets `folder`."""


FORMATS = {
    name: Format(
        library=name,
        tolerance=tolerance,
        write=module.write,
        load=module.load,
        describe_loading=module.describe_loading,
    )
    for name, module, tolerance in (
        ("timm", timm_folder, 1e-5),
        ("torchvision", torchvision_weights, 1e-5),
        ("transformers", transformers_folder, 1e-5),
        ("onnx", onnx_file, 1e-4),
    )
}
"""Value of `--to` -> format."""
