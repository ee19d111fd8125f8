"""Selection: which pair of views of each image is trained on. Usable in anyone's own training loop, without Ray."""

from hvp_ray.selection.candidates import num_pairs, pair_table
from hvp_ray.selection.choice import Selection, choose_pairs, gather_views
from hvp_ray.selection.scoring import score_views

__all__ = ["Selection", "choose_pairs", "gather_views", "num_pairs", "pair_table", "score_views"]
