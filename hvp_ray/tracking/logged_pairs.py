"""The pairs of a run's selection log, and their features, from the plans that `selection_log.py` wrote.

Legend: N logged images, V views per image, P pairs.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvp_ray.errors import DataError
from hvp_ray.tracking.selection_log import METADATA_KEY, PLAN_COLUMNS, selection_files
from hvp_ray.views.geometry import crop_iou

LOG_FORMAT = 1

_FEATURE_OF_FIELD = {
    name: {"hue_turns": "hue", "blur_sigma_px": "blur_differs"}.get(
        name, f"{name}_differs" if kind == pa.bool_() else name
    )
    for name, kind in PLAN_COLUMNS.items()
    if name not in ("top", "left", "height", "width", "jitter")
}
"""Features by field of the plan. Crops have features of their own; missing jitter has neutral factors."""

_DIFFERS = tuple(name for name in _FEATURE_OF_FIELD.values() if name.endswith("_differs"))
_AMOUNTS = tuple(name for name in _FEATURE_OF_FIELD.values() if name not in _DIFFERS)

FEATURES = ("iou", "corner_distance", "area_ratio", *_AMOUNTS, *_DIFFERS)
"""The models' input for each pair; every operation of the plan adds one."""

MEASURES = ("iou", "corner_distance", "color_distance", "smaller_area", "larger_area", *_DIFFERS)
"""Values compared between chosen and other pairs; areas are fractions of the image, of the pair's two crops."""

_IMAGE_COLUMNS: dict[str, pa.DataType] = {
    "step": pa.int64(),
    "epoch": pa.int32(),
    "sample_id": pa.int64(),
    "image_height": pa.int32(),
    "image_width": pa.int32(),
    "chosen_pair": pa.int64(),
    "has_choice": pa.bool_(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRun:
    """The run that a log is of."""

    run_name: str
    recipe: str
    rule: str
    seed: int
    steps_per_epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionLog(LoggedRun):
    """The logged selections of a run, in step order."""

    pairs: NDArray[np.int64]
    """[P, 2], view indices."""
    num_images_left_out: int = 0
    """Logged images with another number of views, or other pairs, than most."""
    images: pa.Table
    """A row per image: step (optimizer steps done), epoch, sample_id, image_height and image_width in px, chosen_pair
    (row of `pairs`), has_choice (false: a random step of a run with hard ones, logged for its scores), scores (a list over
    the pairs, or null), each field of `PLAN_COLUMNS` as a list over the views, and, if there are local views,
    local_scores (a list over pairs and local views, or null)."""

    @property
    def num_images(self) -> int:
        """N."""
        return int(self.images.num_rows)

    @property
    def num_views(self) -> int:
        """V."""
        return int(self.images.schema.field("top").type.list_size)

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.pairs)

    @property
    def local_scores(self) -> NDArray[np.float32] | None:
        """What each local view adds to the score of a pair, [N, P, L], NaN if the step did not score; None: L is 0."""
        if "local_scores" not in self.images.column_names:
            return None
        return self["local_scores"].reshape(self.num_images, self.num_pairs, -1)

    def __getitem__(self, column: str) -> NDArray[Any]:
        """Return a column: [N]; fields of the plan [N, V]; scores [N, P], NaN if the rule needed none."""
        values = self.images[column].combine_chunks()
        if not pa.types.is_fixed_size_list(values.type):
            return np.asarray(values)
        present, size = np.asarray(values.is_valid()), values.type.list_size
        listed = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
        if present.all():
            return listed
        whole = np.full((len(values), size), np.nan, np.float32)
        whole[present] = listed
        return whole

    def take(self, rows: NDArray[np.int64]) -> "SelectionLog":
        """Return the log of some of the images."""
        return dataclasses.replace(self, images=self.images.take(pa.array(rows)))

    def sample(self, limit: int) -> "SelectionLog":
        """Return the log of at most `limit` images, chosen at random by a fixed seed."""
        if self.num_images <= limit:
            return self
        return self.take(np.sort(np.random.default_rng(0).permutation(self.num_images)[:limit]))


def read_selection_log(run_dir: Path) -> SelectionLog:
    """Read the selection log of a run's folder.

    If a resumed run logged steps again, the first record counts. Steps with another number of views, or other pairs,
    than most are left out and counted.

    Raises:
        DataError: no log, or a damaged one.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder; expected the folder of a run, such as runs/<name>")
    layouts: dict[tuple[int, bytes], list[SelectionLog]] = {}
    seen = np.zeros(0, np.int64)
    for path in selection_files(run_dir):
        part = _read_part(path)
        if part is not None:
            fresh = part.take(np.flatnonzero(~np.isin(part["step"], seen)))
            seen = np.union1d(seen, part["step"])
            layouts.setdefault((part.num_views, part.pairs.tobytes()), []).append(fresh)
    if not layouts:
        raise DataError(
            f"{run_dir} has no selection log (log/*/selection-*.parquet): the run chose nothing (selection.rule=first), "
            "or tracking.selection_images_per_epoch is 0, or the run has not reached its first logged step. Train with "
            "another rule and with tracking.selection_images_per_epoch above 0"
        )
    kept = max(layouts.values(), key=lambda logs: sum(log.num_images for log in logs))
    images = pa.concat_tables([log.images for log in kept]).sort_by("step")  # Arrow's sort is stable
    total = sum(log.num_images for logs in layouts.values() for log in logs)
    return dataclasses.replace(kept[0], images=images, num_images_left_out=total - images.num_rows)


def _read_part(path: Path) -> SelectionLog | None:
    """Return one file of the log; None: it has no rows."""
    try:
        table = pq.read_table(path)
        if "has_choice" not in table.column_names:  # written before it existed
            table = table.append_column("has_choice", pa.array(np.ones(table.num_rows, np.bool_)))
        described = json.loads((table.schema.metadata or {})[METADATA_KEY])
        if described["format"] != LOG_FORMAT:
            raise DataError(f"{path} has format {described['format']}; this version reads format {LOG_FORMAT}")
        if not table.num_rows:
            return None
        pairs = np.array(described["pairs"], np.int64).reshape(-1, 2)
        num_views = len(table["top"][0])
        columns = _IMAGE_COLUMNS | {"scores": pa.list_(pa.float32(), len(pairs))}
        columns |= {name: pa.list_(kind, num_views) for name, kind in PLAN_COLUMNS.items()}
        if "local_scores" in table.column_names:
            columns["local_scores"] = pa.list_(pa.float32(), len(pairs) * described["num_local_views"])
        run = {field.name: described[field.name] for field in dataclasses.fields(LoggedRun)}
        log = SelectionLog(**run, pairs=pairs, images=table.select(list(columns)).cast(pa.schema(columns)))
        chosen = log["chosen_pair"]
        if chosen.min() < 0 or chosen.max() >= len(pairs) or pairs.max() >= num_views:
            raise ValueError(f"chosen_pair or pairs exceed {len(pairs)} pairs of {num_views} views")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a selection log ({error}); delete this file to skip it") from error
    return log


def pair_features(log: SelectionLog) -> dict[str, NDArray[np.float32]]:
    """Return the `FEATURES` and `MEASURES` of every pair, each [N, P].

    - iou: of the crops, px of the original image.
    - corner_distance: Euclidean distance of the top-left corners / diagonal of the image.
    - area_ratio, smaller_area, larger_area: of the pair's crops; the latter two as fractions of the image.
    - brightness, contrast, saturation, hue: absolute differences of the factors; a view without jitter has neutral
      ones (1, 1, 1 and 0 turns).
    - color_distance: Euclidean, over the same four.
    - ..._differs: 1 if one view of the pair has it and the other has not.

    Source: automl/hvp, branch analysis, analysis/metric_json_to_csv.py and plot_relative_dist.py.
    Differs: for missing jitter the authors put factors 0, far from any jittered view, and count a single difference as
        0 if either view has no jitter. Here missing jitter has neutral factors.
    """
    first, second = log.pairs[:, 0], log.pairs[:, 1]

    def difference(values: NDArray[Any]) -> NDArray[np.float32]:
        wide = values.astype(np.float32)
        return np.abs(wide[:, first] - wide[:, second])

    image_height, image_width = (log[name].astype(np.float64)[:, None] for name in ("image_height", "image_width"))
    top, left, height, width = (log[name] for name in ("top", "left", "height", "width"))
    areas = (height.astype(np.float64) * width / (image_height * image_width)).astype(np.float32)
    smaller, larger = np.minimum(areas[:, first], areas[:, second]), np.maximum(areas[:, first], areas[:, second])
    of_plan = {
        name: difference(log[field] != 0 if name in _DIFFERS else log[field])
        for field, name in _FEATURE_OF_FIELD.items()
    }
    colors = [of_plan[name] for name in ("brightness", "contrast", "saturation", "hue")]
    diagonal = np.hypot(image_height, image_width).astype(np.float32)
    return {
        "iou": crop_iou(top.T, left.T, height.T, width.T, log.pairs),
        "corner_distance": np.hypot(difference(top), difference(left)) / diagonal,
        "area_ratio": smaller / larger,
        "smaller_area": smaller,
        "larger_area": larger,
        "color_distance": np.sqrt(np.square(colors).sum(axis=0)),
        **of_plan,
    }
