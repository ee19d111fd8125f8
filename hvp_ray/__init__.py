"""Hard View Pretraining (Ferreira et al., ICLR 2025) on a Ray cluster.

Nothing is imported here before it is used: the deterministic core (`config`, `randomness`, `views.plan`, `data.order`)
must stay usable without torch, Ray, DALI or MLflow.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvp_ray.api import Comparison, Run, compare, embed, load_encoder, pretrain

__version__ = "0.1.0"

__all__ = ["Comparison", "Run", "compare", "embed", "load_encoder", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hvp_ray import api

    return getattr(api, name)
