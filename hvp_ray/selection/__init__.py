"""Selection: which views of each image are trained on. Usable in anyone's own training loop, without Ray."""

from hvp_ray.selection.candidates import Candidates, CandidateScores, num_pairs, pair_table
from hvp_ray.selection.choice import DrawnCandidates, Selection, choose_views, gather_views
from hvp_ray.selection.scoring import score_views

__all__ = [
    "CandidateScores",
    "Candidates",
    "DrawnCandidates",
    "Selection",
    "choose_views",
    "gather_views",
    "num_pairs",
    "pair_table",
    "score_views",
]
