"""Operations of a step, counted over an imaginary step. Measured costs are compared with them."""

import dataclasses
from dataclasses import dataclass

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hvp_ray.config import RunConfig
from hvp_ray.costs.imaginary import imagine_step
from hvp_ray.selection import hard_step
from hvp_ray.training.step import choose_step_views, forward_backward


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOperations:
    """Multiplications and additions of convolutions, matrix products and attention in one trainer's step."""

    random_step: int
    """Forward and backward on the views that the vanilla arm trains on."""
    scoring: int
    """Additional operations of a hard step, less those that it saves in training (`selection.reuse_teacher`)."""

    @property
    def ratio(self) -> float:
        """Cost of a hard step / cost of a random step."""
        return (self.random_step + self.scoring) / self.random_step


def count_operations(config: RunConfig) -> StepOperations:
    """Count the operations of a random and of a hard step.

    Elementwise work (normalisation, softmax, the update) is not counted, because memory bounds it, not arithmetic.
    """
    hard = dataclasses.replace(config, selection=dataclasses.replace(config.selection, rule="hardest"))
    # The counter supports attention as two products, and not the fused kernels of some devices.
    with imagine_step(hard) as imagined, sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            chosen = choose_step_views(
                imagined.trainee, imagined.batch, imagined.config, hard_step(imagined.config.selection)
            )
            forward_backward(imagined.trainee, chosen.pixels, imagined.config, step=0, stop_requested=False)
        operations = counter.get_total_flops()
        fresh = dataclasses.replace(chosen.pixels, reusable={})
        with FlopCounterMode(display=False) as counter:
            forward_backward(imagined.trainee, fresh, imagined.config, step=0, stop_requested=False)
        random_step = counter.get_total_flops()
        return StepOperations(random_step=random_step, scoring=operations - random_step)
