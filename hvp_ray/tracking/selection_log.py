"""The choice made for each image: plans, scores and chosen pairs of some steps, as Parquet in the run's log.

`selection-<last step>.parquet` in a segment of the log (`run_log.py`) has a row for each image. `logged_pairs.py` reads
the files that `selection_files` lists.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from hvp_ray.config import RunConfig
from hvp_ray.records import ViewBatch, per_view_types
from hvp_ray.selection import selection_at
from hvp_ray.tracking.run_log import RunLog, live_files

METADATA_KEY = b"hvp_ray"
PLAN_COLUMNS: dict[str, pa.DataType] = {name: pa.from_numpy_dtype(dtype) for name, dtype in per_view_types().items()}
"""Fields of `ViewPlan`, a list over the views for each image."""

_ROWS_PER_PART = 20_000


class SelectionLogWriter:
    """Writes the log of one run, on rank 0."""

    def __init__(self, log: RunLog, config: RunConfig, *, run_name: str, steps_per_epoch: int) -> None:
        self._log = log
        self._selection = config.selection
        self._num_steps = config.training.total_steps(steps_per_epoch)
        hard_steps = max(1, steps_per_epoch // config.selection.every)
        logged_steps = math.ceil(config.tracking.selection_images_per_epoch / config.images_per_rank)
        self._stride = hard_steps // logged_steps or 1 if logged_steps else 0
        self._num_local_views = config.selection.num_local_views or 0
        self._metadata = {
            "format": 1,
            "rule": config.selection.rule,
            "recipe": config.recipe,
            "run_name": run_name,
            "steps_per_epoch": steps_per_epoch,
            "seed": config.run.seed,
            "num_local_views": self._num_local_views,
        }
        self._tables: list[pa.Table] = []
        self._last_step = 0

    def wants(self, steps_done: int) -> bool:
        """Tell whether the choices of this step are logged."""
        step, every = steps_done - 1, self._selection.every
        of_step = selection_at(self._selection, step, self._num_steps)
        is_chosen = step % every == 0 and (of_step.is_hard or of_step.needs_scores)
        return self._stride > 0 and is_chosen and (step // every) % self._stride == 0

    def take(
        self,
        steps_done: int,
        batch: ViewBatch,
        *,
        pairs: Int64[np.ndarray, "pairs 2"],
        chosen: Int64[np.ndarray, " batch"],
        scores: Float32[np.ndarray, "batch pairs"] | None,
        local_scores: Float32[np.ndarray, "batch pairs locals"] | None = None,
    ) -> None:
        """Take the choices of a step.

        Args:
            steps_done: optimizer steps done, this one included.
            batch: plans and sample ids.
            pairs: the candidate pairs, view indices.
            chosen: row of `pairs` of each image.
            scores: loss that each pair would give; None: the step did not score.
            local_scores: what each local view would add to it; a column of P * L values, 4 bytes each before compression
                (256 bytes per image for DINO's 4 + 16 views). None: there are no local views, or the step did not score.
        """
        plan, count = batch.global_views.plan, len(batch.sample_ids)
        of_step = selection_at(self._selection, steps_done - 1, self._num_steps)
        has_choice = of_step.is_hard or self._selection.rule == "first"
        unscored = pa.nulls(count, pa.list_(pa.float32()))
        columns: dict[str, pa.Array] = {
            "step": pa.array(np.full(count, steps_done, np.int64)),
            "epoch": pa.array(np.full(count, batch.epoch, np.int32)),
            "sample_id": pa.array(batch.sample_ids.astype(np.int64)),
            "image_height": pa.array(batch.heights.astype(np.int32)),
            "image_width": pa.array(batch.widths.astype(np.int32)),
            "chosen_pair": pa.array(chosen.astype(np.int16)),
            "has_choice": pa.array(np.full(count, has_choice)),
            "scores": unscored if scores is None else _lists(scores, pa.float32()),
        }
        if self._num_local_views:
            flat = None if local_scores is None else local_scores.reshape(count, -1)
            columns["local_scores"] = unscored if flat is None else _lists(flat, pa.float32())
        for name, kind in PLAN_COLUMNS.items():
            columns[name] = _lists(np.ascontiguousarray(getattr(plan, name).T), kind)
        metadata = {METADATA_KEY: json.dumps(self._metadata | {"pairs": pairs.tolist()}).encode()}
        table = pa.table(columns).replace_schema_metadata(metadata)
        if self._tables and self._tables[-1].schema.metadata != metadata:
            self.flush()
        self._tables.append(table)
        self._last_step = steps_done
        if sum(map(len, self._tables)) >= _ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write the choices since the last call into the open segment; called before a checkpoint closes it."""
        if not self._tables:
            return
        path = self._log.segment / f"selection-{self._last_step:08d}.parquet"
        temporary = path.with_name(path.name + ".part")
        pq.write_table(pa.concat_tables(self._tables), temporary, compression="zstd")
        os.replace(temporary, path)
        self._tables = []


def selection_files(run_dir: Path) -> list[Path]:
    """Return the files of a run's selection log, without those that a resume dropped."""
    return live_files(run_dir, "selection-*.parquet")


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return [N, K] as N lists of K."""
    offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), kind))
