"""Selection: which views of each image are trained on. Usable in your own training loop, without Ray."""

from hvp_ray.selection.candidates import Candidates, CandidateScores, KeptViews, Reusable, num_pairs, pair_table
from hvp_ray.selection.chosen import Selection, gather_reusable, gather_views
from hvp_ray.selection.draw import Draw
from hvp_ray.selection.rescue import easiest_images
from hvp_ray.selection.rules import RULES, choose_views
from hvp_ray.selection.scoring import score_views
from hvp_ray.selection.step_selection import StepSelection, hard_step, selection_at, vanilla_step
from hvp_ray.selection.view_outputs import ViewOutputs
from hvp_ray.selection.weights import WEIGHTINGS, PairWeighting, pair_weights_of

__all__ = [
    "RULES",
    "WEIGHTINGS",
    "CandidateScores",
    "Candidates",
    "Draw",
    "KeptViews",
    "PairWeighting",
    "Reusable",
    "Selection",
    "StepSelection",
    "ViewOutputs",
    "choose_views",
    "easiest_images",
    "gather_reusable",
    "gather_views",
    "hard_step",
    "num_pairs",
    "pair_table",
    "pair_weights_of",
    "score_views",
    "selection_at",
    "vanilla_step",
]
