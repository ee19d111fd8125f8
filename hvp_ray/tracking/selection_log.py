"""What was chosen, image by image: plans, scores and choices of some steps, as Parquet in a run's folder.

`<run>/selection/part-<first step>-<last step>.parquet` has a row for each image. A resumed run drops the rows of the steps
that it does again. Read by `logged_pairs.py`.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from hvp_ray.config import RunConfig
from hvp_ray.records import ViewBatch, per_view_types

FOLDER = "selection"
METADATA_KEY = b"hvp_ray"
PLAN_COLUMNS: dict[str, pa.DataType] = {name: pa.from_numpy_dtype(dtype) for name, dtype in per_view_types().items()}
"""Fields of `ViewPlan`, a list over the views for each image."""

_ROWS_PER_PART = 20_000


class SelectionLogWriter:
    """Writes the log of one run, on rank 0."""

    def __init__(
        self, run_dir: Path, config: RunConfig, *, run_name: str, steps_per_epoch: int, first_step: int
    ) -> None:
        self._folder = run_dir / FOLDER
        self._config = config
        hard_steps = max(1, steps_per_epoch // config.selection.every)
        logged_steps = math.ceil(config.tracking.selection_images_per_epoch / config.images_per_rank)
        self._stride = hard_steps // logged_steps or 1 if logged_steps else 0
        self._metadata = {
            "format": 1,
            "rule": config.selection.rule,
            "recipe": config.recipe,
            "run_name": run_name,
            "steps_per_epoch": steps_per_epoch,
            "seed": config.run.seed,
        }
        self._tables: list[pa.Table] = []
        self._steps: list[int] = []
        _drop_steps_behind(self._folder, first_step)

    def wants(self, steps_done: int) -> bool:
        """Tell whether the choices of this step are written down."""
        step, every = steps_done - 1, self._config.selection.every
        return self._stride > 0 and step % every == 0 and (step // every) % self._stride == 0

    def take(
        self,
        steps_done: int,
        batch: ViewBatch,
        *,
        pairs: Int64[np.ndarray, "pairs 2"],
        chosen: Int64[np.ndarray, " batch"],
        scores: Float32[np.ndarray, "batch pairs"] | None,
    ) -> None:
        """Take the choices of a step.

        Args:
            steps_done: optimizer steps done, this one included.
            batch: plans and sample ids.
            pairs: the candidate pairs, view indices.
            chosen: row of `pairs` of each image.
            scores: loss that each pair would give; None: the step did not score.
        """
        plan, count = batch.global_views.plan, len(batch.sample_ids)
        columns: dict[str, pa.Array] = {
            "step": pa.array(np.full(count, steps_done, np.int64)),
            "epoch": pa.array(np.full(count, batch.epoch, np.int32)),
            "sample_id": pa.array(batch.sample_ids.astype(np.int64)),
            "image_height": pa.array(batch.heights.astype(np.int32)),
            "image_width": pa.array(batch.widths.astype(np.int32)),
            "chosen_pair": pa.array(chosen.astype(np.int16)),
            "scores": pa.nulls(count, pa.list_(pa.float32())) if scores is None else _lists(scores, pa.float32()),
        }
        for name, kind in PLAN_COLUMNS.items():
            columns[name] = _lists(np.ascontiguousarray(getattr(plan, name).T), kind)
        metadata = {METADATA_KEY: json.dumps(self._metadata | {"pairs": pairs.tolist()}).encode()}
        table = pa.table(columns).replace_schema_metadata(metadata)
        if self._tables and self._tables[-1].schema.metadata != metadata:
            self.flush()
        self._tables.append(table)
        self._steps.append(steps_done)
        if sum(map(len, self._tables)) >= _ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write what was taken; called before a checkpoint, so that no step in front of it is missing."""
        if not self._tables:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"part-{self._steps[0]:08d}-{self._steps[-1]:08d}.parquet"
        _write(self._folder / name, pa.concat_tables(self._tables))
        self._tables, self._steps = [], []


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return [N, K] as N lists of K."""
    offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), kind))


def _drop_steps_behind(folder: Path, last_step: int) -> None:
    for path in sorted(folder.glob("part-*.parquet")):
        first, last = map(int, path.stem.split("-")[1:])
        if last <= last_step:
            continue
        if first <= last_step:
            table = pq.read_table(path)
            kept = table.filter(pc.less_equal(table["step"], last_step))
            _write(folder / f"part-{first:08d}-{last_step:08d}.parquet", kept)
        path.unlink()


def _write(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(path.name + ".part")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)
