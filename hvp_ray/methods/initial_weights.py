"""Weights to start from: those of a run, or released ones of timm, torchvision, DINO, DINOv2 and others.

A file is safetensors, or a torch file of tensors, which is read without running what it pickles. Released files name the same
network differently; what is not the network's own (`module.`, `teacher`, `encoder_q.`) is found by a name that every file
has, that of the first weights. timm converts the rest: names of DINOv2, position embeddings of another size.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from hvp_ray.errors import CheckpointError, first_line
from hvp_ray.methods.method import Method

_WRAPPERS = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model", "student")
"""Keys under which a checkpoint may keep the weights, the best first."""
_NUM_NAMES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How the weights of a file fitted a network."""

    num_loaded: int
    """Tensors of the network that got the weights of the file."""
    missing: tuple[str, ...]
    """Tensors of the network that the file lacks; they keep their random weights."""
    other_shapes: tuple[str, ...]
    """Tensors of another shape in the file, as `name [file's shape], not [network's]`; they keep their random weights."""
    unused: tuple[str, ...]
    """Tensors of the file that the network lacks."""
    adapted: tuple[str, ...] = ()
    """First convolutions for another number of channels, as `name [file's shape] to [network's]`: timm repeats or sums
    their weights over the channels."""

    @property
    def num_tensors(self) -> int:
        """Tensors of the network."""
        return self.num_loaded + len(self.missing) + len(self.other_shapes)

    def describe(self) -> str:
        """Return what fitted and what did not, in a line."""
        parts = [f"{self.num_loaded} of {self.num_tensors} tensors of the encoder are loaded"]
        if self.adapted:
            parts.append(f"fitted to the channels: {_listed(self.adapted)}")
        if self.missing:
            parts.append(f"not in the file: {_listed(self.missing)}")
        if self.other_shapes:
            parts.append(f"of another shape: {_listed(self.other_shapes)}")
        if self.unused:
            parts.append(f"not used: {_listed(self.unused)}")
        return "; ".join(parts)


def load_initial_weights(backbone: nn.Module, location: str) -> Fit:
    """Copy the weights of a run's folder, or of a file, into `backbone`; return what fitted.

    Args:
        backbone: the encoder.
        location: `training.initial_weights`, on this machine.

    Raises:
        CheckpointError: there is no such file, it holds no weights, or they are of another network: fewer than half of its
            tensors fit.
    """
    path = Path(location).expanduser()
    path = path / "backbone.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"training.initial_weights={location!r}: there is no file {path}")
    own = backbone.state_dict()
    found, unused = _select(_read_tensors(path), next(iter(own)))
    if isinstance(backbone, VisionTransformer) and found:
        try:
            found = checkpoint_filter_fn(found, backbone)
        except (RuntimeError, KeyError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"training.initial_weights={location!r} does not fit the backbone: {first_line(error)}"
            ) from error
    adapted = _adapt_channels(found, own)
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    fitting = {name: value for name, value in found.items() if name in own and value.shape == own[name].shape}
    fit = Fit(
        num_loaded=len(fitting),
        missing=tuple(name for name in own if name not in found and name not in counters),
        other_shapes=tuple(
            f"{name} {list(value.shape)}, not {list(own[name].shape)}"
            for name, value in found.items()
            if name in own and name not in fitting
        ),
        unused=tuple(name for name in (*found, *unused) if name not in own),
        adapted=adapted,
    )
    if fit.num_loaded < fit.num_tensors / 2:
        raise CheckpointError(f"training.initial_weights={location!r} does not fit the backbone: {fit.describe()}")
    backbone.load_state_dict(fitting, strict=False)
    return fit


def load_initial_state(method: Method, state: dict[str, Tensor], location: str) -> None:
    """Copy all weights of a run into a method of the same form; position embeddings are interpolated.

    Args:
        method: untrained.
        state: of a checkpoint.
        location: `training.initial_run`.

    Raises:
        CheckpointError: the run has another method or network.
    """
    own, fitting = method.state_dict(), dict(state)
    for prefix, encoder in method.named_modules():
        name = f"{prefix}.pos_embed"
        if isinstance(encoder, VisionTransformer) and name in state and state[name].shape != own[name].shape:
            fitting[name] = resample_abs_pos_embed(
                state[name],
                list(encoder.patch_embed.grid_size),
                num_prefix_tokens=0 if encoder.no_embed_class else encoder.num_prefix_tokens,
            )
    differing = [name for name in own if name not in fitting or fitting[name].shape != own[name].shape]
    differing += [name for name in fitting if name not in own]
    if differing:
        raise CheckpointError(
            f"training.initial_run={location!r} does not fit: {len(differing)} tensors are in one of the two only, or have "
            f"another shape ({_listed(tuple(differing))}). Give the method and network of that run, as its config.json says; "
            f"for its encoder alone use training.initial_weights"
        )
    method.load_state_dict(fitting)


def _adapt_channels(found: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[str, ...]:
    """Convert, in place, convolutions of RGB images that differ from the network's only in the number of channels."""
    adapted = []
    for name, value in found.items():
        shape = own[name].shape if name in own else value.shape
        is_of_rgb = value.ndim == 4 and value.shape[1] == 3
        if is_of_rgb and shape[1] != 3 and (value.shape[0], *value.shape[2:]) == (shape[0], *shape[2:]):
            found[name] = adapt_input_conv(shape[1], value)
            adapted.append(f"{name} {list(value.shape)} to {list(shape)}")
    return tuple(adapted)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name.

    Raises:
        CheckpointError: it is neither safetensors nor a torch file of tensors.
    """
    expected = "expected safetensors, or a torch file that holds nothing but tensors"
    try:
        with path.open("rb") as file:
            is_torch = file.read(2) in (b"PK", b"\x80\x02")
        if not is_torch:
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {first_line(error)}; {expected}") from error
    while isinstance(content, dict):
        wrapped = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        if wrapped is None:
            break
        content = wrapped
    named = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no weights by name; {expected}")
    return tensors


def _select(tensors: dict[str, Tensor], first: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of the encoder without the prefix of their names, and the names of the others.

    Args:
        tensors: all tensors of a file.
        first: name of the encoder's first tensor. A Vision Transformer's is its class token; files of timm, DINO and DINOv2
            have it under that name. If it occurs several times, the teacher's counts, as in `_WRAPPERS`; else the first one.
    """
    named = [name for name in tensors if name == first or name.endswith(f".{first}")]
    if not named:
        return {}, list(tensors)
    prefix = next((name for name in named if "teacher" in name), named[0]).removesuffix(first)
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return own, [name for name in tensors if not name.startswith(prefix)]


def _listed(names: tuple[str, ...]) -> str:
    more = len(names) - _NUM_NAMES
    return ", ".join(names[:_NUM_NAMES]) + (f" and {more} more" if more > 0 else "")
