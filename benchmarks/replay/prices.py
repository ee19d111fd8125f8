"""The price of a step, in random steps, by counting operations."""

import dataclasses
from typing import Any

from hvp_ray.config import Rule, RunConfig
from hvp_ray.costs.operations import operations_of_step
from hvp_ray.selection import hard_step, vanilla_step


class Prices:
    """Prices of one run's steps, all of which train on as many images. A step of random views costs 1."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._counted: dict[tuple[Rule, int], float] = {}
        self._random_step = operations_of_step(*self._step(vanilla_step, rule="hardest", num_views=2))

    def hard(self, num_views: int) -> float:
        """Return the price of scoring all candidates of this many global views and training on one of them."""
        return self._price("hardest", num_views)

    def all_pairs(self, num_views: int) -> float:
        """Return the price of training on all views."""
        return self._price("all_pairs", num_views)

    def probed(self, num_views: int, *, probe_images: int, probe_every: int) -> float:
        """Return the price of training on a predicted pair, learned from this many global views of some images."""
        counted = 2  # images; each costs the same
        of_counted = self._price("predicted", num_views, probe_images=counted) - 1.0
        return 1.0 + of_counted * probe_images / counted / probe_every

    def _price(self, rule: Rule, num_views: int, **fields: int) -> float:
        if (rule, num_views) not in self._counted:
            operations = operations_of_step(*self._step(hard_step, rule=rule, num_views=num_views, **fields))
            self._counted[rule, num_views] = operations / self._random_step
        return self._counted[rule, num_views]

    def _step(self, step_of: Any, *, rule: Rule, num_views: int, **fields: int) -> Any:
        name = "num_views" if self._config.selection.num_global_views is None else "num_global_views"
        changes: dict[str, Any] = {name: num_views, "limit": None, **fields}
        unscored = dataclasses.replace(self._config.selection, score_always=False)
        selection = dataclasses.replace(unscored.with_rule(rule), **changes)
        return dataclasses.replace(self._config, selection=selection), step_of(selection)
