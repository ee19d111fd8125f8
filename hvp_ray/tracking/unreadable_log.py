"""Decisions on unreadable images of one rank, and the budget for them."""

from dataclasses import asdict, replace
from pathlib import Path

from hvp_ray.errors import DataError
from hvp_ray.records import Replacement, ViewBatch
from hvp_ray.tracking.run_log import RunLog, read_records

_PREFIX = "unreadable-rank-"
_JUDGED_AFTER_IMAGES = 1000


class UnreadableLog:
    """The decisions of a rank, written before they take effect, and those of earlier attempts.

    A rank reads the decisions of all ranks and attempts. With another number of trainers than before, a position may have
    been another rank's, and a decision holds although no checkpoint has its step.
    """

    def __init__(self, log: RunLog, *, rank: int, images_per_rank: int, max_fraction: float) -> None:
        self._log = log
        self._name = f"{_PREFIX}{rank}"
        self._first_index = rank * images_per_rank
        self._max_fraction = max_fraction
        self.known: dict[int, tuple[Replacement, ...]] = {}
        """Step -> decisions of earlier attempts; the first decision on a position counts."""
        for record in read_records(log.run_dir, f"{_PREFIX}*", dropped=True):
            decisions = [Replacement(**decision) for decision in record["replacements"]]
            moved = [replace(d, index=d.index + record["first_index"] - self._first_index) for d in decisions]
            others = self.known.get(record["step"], ())
            taken = {d.index for d in others}
            here = tuple(d for d in moved if 0 <= d.index < images_per_rank and d.index not in taken)
            if here:
                self.known[record["step"]] = (*others, *here)
        self.num_images = 0
        self.num_unreadable = 0

    def take(self, batch: ViewBatch) -> None:
        """Count a batch and write its decisions, before it is trained on.

        Raises:
            DataError: more than the allowed share of the images is unreadable.
        """
        self.num_images += len(batch.sample_ids)
        if not batch.replacements:
            return
        self.num_unreadable += len(batch.replacements)
        known = {replacement.index for replacement in self.known.pop(batch.step, ())}
        if any(replacement.index not in known for replacement in batch.replacements):
            decisions = [asdict(replacement) for replacement in batch.replacements]
            record = {"step": batch.step, "first_index": self._first_index, "replacements": decisions}
            self._log.write(self._name, record)
        fraction = self.num_unreadable / self.num_images
        if self.num_images >= _JUDGED_AFTER_IMAGES and fraction > self._max_fraction:
            last = batch.replacements[-1]
            raise DataError(
                f"{self.num_unreadable} of {self.num_images} images are unreadable ({fraction:.1%}), more than "
                f"data.max_unreadable_fraction={self._max_fraction}; the last one, {last.place}: {last.reason}. Repair "
                f"the data ({self._log.segment / self._name}.jsonl lists them), or raise the limit"
            )


def unreadable_images(run_dir: Path) -> dict[int, str]:
    """Return id -> reason of all images that a run replaced."""
    return {
        replacement["unreadable_id"]: replacement["reason"]
        for record in read_records(run_dir, f"{_PREFIX}*", dropped=True)
        for replacement in record["replacements"]
    }


def is_decision(name: str) -> bool:
    """Tell whether a file of a run's folder holds decisions, by its name in the folder."""
    return name.rpartition("/")[2].startswith(_PREFIX)


def is_decision_of(name: str, rank: int) -> bool:
    """Tell whether a file of a run's folder holds the decisions of this rank."""
    return name.rpartition("/")[2] == f"{_PREFIX}{rank}.jsonl"
