"""Rescue: score the first pair of every image, and all pairs of the images whose first pair is easiest.

Other images are trained on their first pair, with the hardest local views. So only easy images cost the forward pass of
their other views. All views are rendered beforehand: a step that rendered more views would wait for a view worker.

Legend: V global views, L local views, B images, Q rescued images, P pairs.
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hvp_ray.selection.candidates import Candidates, CandidateScores, KeptViews, Reusable
from hvp_ray.selection.view_outputs import ViewOutputs


def easiest_images(scores_B: Float[Tensor, " batch"], count: int) -> Int64[Tensor, " rescued"]:
    """Return the indices, ascending, of the `count` smallest scores; of equal scores, the first ones."""
    return scores_B.argsort(stable=True)[:count].sort().values


def score_with_rescue(
    first: ViewOutputs,
    embed_others: Callable[[Int64[Tensor, " rescued"]], ViewOutputs],
    compare: Callable[[ViewOutputs, Candidates], CandidateScores],
    candidates: Candidates,
) -> CandidateScores:
    """Score all candidates of `candidates.rescue_share` of the images, and those of pair 0 of the other images.

    Args:
        first: outputs for views 0 and 1, and for the local views, of all images.
        embed_others: forwards the other global views of some images.
        compare: see `Method.compare`.
        candidates: all candidates.

    Returns:
        Scores in which pairs that were not scored are -inf, and their local views add 0. Reusable results of views that
        were not forwarded are 0.
    """
    of_first = compare(first, dataclasses.replace(candidates, num_views=2, rescue_share=1.0))
    of_images = of_first.best_of_pairs(candidates.num_chosen_local_views)[:, 0]
    count = candidates.num_rescued(len(of_images))
    images = easiest_images(of_images, count)
    rescued = None
    if count:
        outputs = first.with_other_views(embed_others(images), images)
        rescued = compare(outputs, dataclasses.replace(candidates, rescue_share=1.0))

    def joined(of_pair: Tensor, of_rescued: Tensor | None, unscored: float) -> Tensor:
        whole = of_pair.new_full((len(of_pair), len(candidates.pairs), *of_pair.shape[2:]), unscored)
        whole[:, :1] = of_pair
        if of_rescued is not None:
            whole[images] = of_rescued
        return whole

    locals_BPL = None
    if of_first.locals_BPL is not None:
        locals_BPL = joined(of_first.locals_BPL, None if rescued is None else rescued.locals_BPL, 0.0)
    reusable: Reusable = {}
    for name, of_two in of_first.reusable.items():
        of_rescued = None if rescued is None else rescued.reusable[name]
        assert not isinstance(of_two, KeptViews) and not isinstance(of_rescued, KeptViews)  # refused by the config
        whole = of_two.new_zeros(candidates.num_views, *of_two.shape[1:])
        whole[:2] = of_two
        if of_rescued is not None:
            whole[:, images] = of_rescued
        reusable[name] = whole
    return CandidateScores(
        pairs_BP=joined(of_first.pairs_BP, None if rescued is None else rescued.pairs_BP, -torch.inf),
        locals_BPL=locals_BPL,
        reusable=reusable,
    )
