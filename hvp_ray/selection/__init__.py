"""Selection: which views of each image are trained on. Usable in your own training loop, without Ray."""

from hvp_ray.selection.candidates import Candidates, CandidateScores, num_pairs, pair_table
from hvp_ray.selection.chosen import Selection, gather_views
from hvp_ray.selection.draw import Draw
from hvp_ray.selection.rules import RULES, choose_views
from hvp_ray.selection.scoring import score_views
from hvp_ray.selection.step_selection import StepSelection, hard_step, selection_at, vanilla_step

__all__ = [
    "RULES",
    "CandidateScores",
    "Candidates",
    "Draw",
    "Selection",
    "StepSelection",
    "choose_views",
    "gather_views",
    "hard_step",
    "num_pairs",
    "pair_table",
    "score_views",
    "selection_at",
    "vanilla_step",
]
