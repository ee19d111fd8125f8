"""Operations of a step, counted over an imaginary step. Measured costs are compared with them."""

import dataclasses
from dataclasses import dataclass

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hvp_ray.config import RunConfig
from hvp_ray.costs.imaginary import imagine_step
from hvp_ray.selection import RULES, StepSelection, hard_step, vanilla_step
from hvp_ray.training.step import choose_step_views, forward_backward, probe_plans


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOperations:
    """Multiplications and additions of convolutions, matrix products and attention in one trainer's step."""

    random_step: int
    """Forward and backward on the views that the vanilla arm trains on."""
    scoring: int
    """Additional operations of a hard step, less those that reuse saves in training. With rule
    predicted those of its probes, as a mean over all steps."""

    @property
    def ratio(self) -> float:
        """Cost of a hard step / cost of a random step."""
        return (self.random_step + self.scoring) / self.random_step


def count_operations(config: RunConfig) -> StepOperations:
    """Count the operations of a random step and of one that follows `selection.rule`.

    For rules `first` and `all_pairs`, which choose nothing, the latter is a hard step.

    Elementwise work (normalisation, softmax, the update) is not counted, because memory bounds it, not arithmetic.
    """
    selection = config.selection
    if selection.rule == "first" or RULES[selection.rule].trains_on_all_views:
        selection = selection.with_rule("hardest")
        config = dataclasses.replace(config, selection=selection)
    share = selection.probe_every if selection.rule == "predicted" else 1
    random = vanilla_step(dataclasses.replace(selection, score_always=False))
    random_step, hard = (operations_of_step(config, of_step) for of_step in (random, hard_step(selection)))
    return StepOperations(random_step=random_step, scoring=(hard - random_step) // share)


def operations_of_step(config: RunConfig, of_step: StepSelection) -> int:
    """Count the operations of one kind of a run's steps: scoring and probes, if it has them, and training."""
    # The counter supports attention as two products, and not the fused kernels of some devices.
    with imagine_step(config) as imagined, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        chosen = choose_step_views(imagined.trainee, imagined.batch, imagined.config, of_step)
        probe_plans(imagined.trainee, imagined.batch, imagined.config, of_step)
        forward_backward(imagined.trainee, chosen.pixels, imagined.config, step=0, stop_requested=False)
    return int(counter.get_total_flops())
