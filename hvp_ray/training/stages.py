"""The named parts of a training step, for profiling.

A step enters `Trainee.stage(name)` around each of its parts. By default that names them for torch's profiler, which costs
about a microsecond when none is running. `benchmarks/step.py` puts its clock there instead.
"""

from contextlib import AbstractContextManager
from typing import Literal

import torch

Stage = Literal[
    "copy",  # wait for the host-to-device copy of the batch
    "downscale",  # smaller views for scoring
    "normalise",  # bytes to floats, of the candidates and of the chosen views
    "score",  # forward all candidates and compute their scores
    "choose",
    "gather",
    "forward",  # forward the chosen views and compute the loss
    "backward",
    "collectives",  # sums over the trainers
    "update",  # clipping, optimizer, teacher, centre
]


def name_for_profiler(stage: Stage) -> AbstractContextManager[None]:
    """Name a part of the step in traces of torch's profiler."""
    named: AbstractContextManager[None] = torch.profiler.record_function(f"hvp_ray.{stage}")
    return named
