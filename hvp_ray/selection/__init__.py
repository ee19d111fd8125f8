"""Selection: which views of each image are trained on. Usable in your own training loop, without Ray."""

from hvp_ray.selection.candidates import Candidates, CandidateScores, candidates_of, num_pairs, pair_table
from hvp_ray.selection.chosen import Selection, gather_views
from hvp_ray.selection.draw import Draw
from hvp_ray.selection.rules import RULES, choose_views, needs_scores_at, rule_at
from hvp_ray.selection.scoring import score_views

__all__ = [
    "RULES",
    "CandidateScores",
    "Candidates",
    "Draw",
    "Selection",
    "candidates_of",
    "choose_views",
    "gather_views",
    "needs_scores_at",
    "num_pairs",
    "pair_table",
    "rule_at",
    "score_views",
]
