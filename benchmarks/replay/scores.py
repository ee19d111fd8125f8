"""The scores of a run's selection log, as the rules of `hvp_ray.selection` read them.

Legend: N logged images, V global views, L local views, P pairs, S logged steps, k local views trained on.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.config import Rule, RunConfig
from hvp_ray.errors import DataError
from hvp_ray.records import ViewPlan
from hvp_ray.selection import Candidates, CandidateScores, Draw, Selection, choose_views
from hvp_ray.tracking.logged_pairs import SelectionLog
from hvp_ray.tracking.selection_log import PLAN_COLUMNS


def score_of(scores: CandidateScores, selection: Selection) -> Float[Tensor, " batch"]:
    """Return the score of each image's chosen candidate."""
    assert selection.pair_indices is not None
    pair = selection.pair_indices[:, None]
    chosen = scores.pairs_BP.gather(1, pair)[:, 0]
    if scores.locals_BPL is not None and selection.local_indices is not None:
        of_pair = scores.locals_BPL.gather(1, pair[..., None].expand(-1, 1, scores.locals_BPL.shape[2]))[:, 0]
        chosen = chosen + of_pair.gather(1, selection.local_indices.T).sum(dim=1)
    return chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedScores:
    """The scores of all candidates of the logged images of a run, in step order."""

    seed: int
    """The run's seed."""
    step_N: NDArray[np.int64]  # noqa: N815 (shape letters)
    """Optimizer steps done, ascending."""
    epoch_N: NDArray[np.int32]  # noqa: N815
    sample_id_N: NDArray[np.int64]  # noqa: N815
    image_sizes: tuple[NDArray[np.int32], NDArray[np.int32]]
    """Heights and widths, [N], px."""
    plan: ViewPlan
    candidates: Candidates
    scores: CandidateScores

    @staticmethod
    def of_log(log: SelectionLog, config: RunConfig) -> "LoggedScores":
        """Return the scores of a run's log.

        Raises:
            DataError: some logged candidates have no scores.
        """
        scores_NP = log["scores"]
        if not np.isfinite(scores_NP).all():
            raise DataError(
                f"the selection log of {log.run_name} has candidates without scores; replay a run with "
                f"selection.rule=hardest and selection.rescue_share=1, or with selection.score_always=true"
            )
        local_scores, chosen_locals = log.local_scores, config.selection.num_chosen_local_views or 0
        pairs, of_locals = torch.from_numpy(scores_NP.copy()), None
        if local_scores is not None:
            of_locals = torch.from_numpy(local_scores.copy())
            # The log has the score of each pair with its hardest local views.
            pairs = pairs - of_locals.topk(chosen_locals, dim=2).values.sum(dim=2)
        of_views: dict[str, Any] = {name: np.ascontiguousarray(log[name].T) for name in PLAN_COLUMNS}
        return LoggedScores(
            seed=log.seed,
            step_N=log["step"],
            epoch_N=log["epoch"],
            sample_id_N=log["sample_id"],
            image_sizes=(log["image_height"], log["image_width"]),
            plan=ViewPlan(**of_views, jitter_order=np.zeros((log.num_views, log.num_images, 4), np.uint8)),
            candidates=Candidates(
                num_views=log.num_views,
                num_local_views=0 if local_scores is None else local_scores.shape[2],
                num_chosen_local_views=chosen_locals,
                alternating=config.views.slots_keep_transforms,
            ),
            scores=CandidateScores(pairs_BP=pairs, locals_BPL=of_locals),
        )

    def of_first_views(self, num_views: int) -> "LoggedScores":
        """Return the scores of the candidates among the first global views; scores are those of the whole batch of views."""
        kept = np.flatnonzero((self.candidates.pairs < num_views).all(axis=1))
        of_locals = self.scores.locals_BPL
        return dataclasses.replace(
            self,
            plan=ViewPlan(**{name: array[:num_views] for name, array in self.plan.arrays().items()}),
            candidates=dataclasses.replace(self.candidates, num_views=num_views),
            scores=CandidateScores(
                pairs_BP=self.scores.pairs_BP[:, kept], locals_BPL=None if of_locals is None else of_locals[:, kept]
            ),
        )

    def steps(self) -> Iterator[slice]:
        """Yield the images of each logged step."""
        starts = np.flatnonzero(np.diff(self.step_N, prepend=-1))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(self.step_N)], strict=True):
            yield slice(start, end)

    def take(self, images: slice) -> "LoggedScores":
        """Return the scores of some of the images."""
        of_locals = self.scores.locals_BPL
        return dataclasses.replace(
            self,
            step_N=self.step_N[images],
            epoch_N=self.epoch_N[images],
            sample_id_N=self.sample_id_N[images],
            image_sizes=(self.image_sizes[0][images], self.image_sizes[1][images]),
            plan=ViewPlan(**{name: array[:, images] for name, array in self.plan.arrays().items()}),
            scores=CandidateScores(
                pairs_BP=self.scores.pairs_BP[images], locals_BPL=None if of_locals is None else of_locals[images]
            ),
        )

    def mean(self) -> NDArray[np.float64]:
        """Return the mean over the candidates of each image, [N]."""
        return _array(self.scores.mean(self.candidates.num_chosen_local_views))

    def chosen_by(self, rule: Rule, *, quantile: float = 1.0, limit: int | None = None) -> NDArray[np.float64]:
        """Return the score of the candidate that a rule chooses for each image, [N]. Draws are those of the run's rank 0."""
        chosen = []
        for images in self.steps():
            step = self.take(images)
            selection = choose_views(
                rule,
                dataclasses.replace(self.candidates, limit=limit),
                num_images=len(step.step_N),
                device=torch.device("cpu"),
                quantile=quantile,
                scores=step.scores,
                plan=step.plan,
                draw=Draw(
                    seed=self.seed,
                    step=int(step.step_N[0]) - 1,
                    rank=0,
                    epoch=int(step.epoch_N[0]),
                    sample_ids=step.sample_id_N,
                ),
            )
            chosen.append(score_of(step.scores, selection))
        return _array(torch.cat(chosen))

    def of_pairs(self, pair_indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the score of a pair of each image with the first k local views, [N]."""
        chosen = torch.from_numpy(pair_indices)[:, None]
        with_locals = self.scores.pairs_BP
        if self.scores.locals_BPL is not None:
            with_locals = with_locals + self.scores.locals_BPL[..., : self.candidates.num_chosen_local_views].sum(dim=2)
        return _array(with_locals.gather(1, chosen)[:, 0])


def _array(scores: Tensor) -> NDArray[np.float64]:
    return scores.double().numpy()
