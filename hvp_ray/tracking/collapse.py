"""Metrics of collapse, and warnings. Harder views raise the risk of collapse."""

import logging

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hvp_ray.errors import TrainingError

logger = logging.getLogger(__name__)

COLLAPSED_STD = 0.1
"""Below this `collapse/embedding_std` a warning is logged; an isotropic distribution has 1."""

COLLAPSED_INFORMATION = 0.02
"""Below this `collapse/teacher_information`, in nats, a warning is logged."""

GRACE_STEPS = 100
"""Steps before the teacher is judged, and before collapsed steps count: untrained outputs say little about the image."""


def embedding_std(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return the standard deviation of the normalised embeddings over the batch, x sqrt(D).

    Source: SimSiam, section 4.1 (figure 2, middle): 1 / sqrt(D) is healthy, 0 is collapse.
    """
    normalised = F.normalize(embeddings.float(), dim=1)
    return normalised.std(dim=0).mean() * embeddings.shape[1] ** 0.5


def effective_rank(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return exp of the entropy of the normalised singular values of the centred embeddings.

    Source: Roy, Vetterli 2007. RankMe (Garrido et al., ICML 2023) is this without centring.
    """
    centred = embeddings.float() - embeddings.float().mean(dim=0)
    singular = torch.linalg.svdvals(centred)
    shares = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum())


_ADVICE = (
    "Lower the learning rate, check the data for near-duplicates, or train on easier views (selection.every=2, a larger "
    "minimum of crop_scale)"
)


class CollapseWatch:
    """Warns once when embeddings or teacher collapse, and again if they collapse after a recovery.

    Args:
        max_steps: steps of collapse in succession that end the run. None: it only warns.
    """

    def __init__(self, *, max_steps: int | None = None) -> None:
        self.num_warnings = 0
        self._warned: set[str] = set()
        self._max_steps = max_steps
        self._collapsed_since: dict[str, int] = {}

    def see(self, step: int, values: dict[str, float]) -> None:
        """Check the `collapse/` values of a step.

        Raises:
            TrainingError: the collapse has lasted for `max_steps`.
        """
        std = values.get("collapse/embedding_std", float("nan"))
        self._judge(
            "embeddings",
            step,
            collapsed=std < COLLAPSED_STD,
            recovered=std > 2 * COLLAPSED_STD,
            finding=f"the embeddings have nearly collapsed (standard deviation x sqrt(D) = {std:.3f}, healthy is 1)",
        )
        information = values.get("collapse/teacher_information", float("nan"))
        self._judge(
            "teacher",
            step,
            collapsed=information < COLLAPSED_INFORMATION and step > GRACE_STEPS,
            recovered=information > 2 * COLLAPSED_INFORMATION,
            finding=f"the teacher's output hardly depends on the image ({information:.4f} nats of information)",
        )

    def _judge(self, what: str, step: int, *, collapsed: bool, recovered: bool, finding: str) -> None:
        if collapsed and what not in self._warned:
            logger.warning("step %d: %s. %s", step, finding, _ADVICE)
            self._warned.add(what)
            self.num_warnings += 1
        elif recovered:
            self._warned.discard(what)
        if not collapsed or step <= GRACE_STEPS:
            self._collapsed_since.pop(what, None)
            return
        lasted = step - self._collapsed_since.setdefault(what, step)
        if self._max_steps is not None and lasted >= self._max_steps:
            raise TrainingError(
                f"step {step}: {finding}, for {lasted} steps now; training.max_collapsed_steps={self._max_steps} ends the "
                f"run. {_ADVICE}"
            )
