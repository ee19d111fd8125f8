"""What all subjects have to deliver: the same batches of the same photographs, addressed by step."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.photographs import CHAINS, load_photographs
from hvp_ray.config import RunConfig
from hvp_ray.costs.prefetch import batch_bytes
from hvp_ray.data.dataset import open_dataset
from hvp_ray.recipes import get_recipe
from hvp_ray.runs.rank import build_order
from hvp_ray.stream.batches import RequestOf, requests_of_rank

ROW_GROUP = 100  # rows; what Hugging Face's `datasets` writes for images


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One task, as a run of the product that has this many images a step and an epoch."""

    config: RunConfig
    steps_per_epoch: int
    epochs: int

    @property
    def images_per_step(self) -> int:
        return self.config.training.images_per_step

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def batch_bytes(self) -> int:
        """Bytes of pixels of a batch."""
        return batch_bytes(self.config)

    @property
    def store_bytes(self) -> int:
        """Object store of all subjects: three look-aheads, as `cluster.object_store_mib=auto` does, at least 1 GiB."""
        return max(2**30, 3 * (self.config.cluster.batches_in_flight + 1) * self.batch_bytes)


def build_setting(
    *, data: Path | None, folder: Path, images_per_step: int, size_px: int, steps_per_epoch: int, epochs: int
) -> Setting:
    """Write photographs for an epoch into `folder`, the first ones again where `data` has fewer, and return the task.

    SimSiam's chain, 4 views of each photograph; the CPU renderer; nothing is tracked.
    """
    count = steps_per_epoch * images_per_step
    source = folder / "photographs.parquet"
    images = load_photographs(data, min(count, 512 if data is not None else 64)).first(count).images
    struct = pa.array(
        [{"bytes": image, "path": None} for image in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": struct}), source, row_group_size=ROW_GROUP)
    config = get_recipe(CHAINS["simsiam"])
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, output=str(folder / "runs")),
        data=dataclasses.replace(config.data, source=str(source), test_fraction=0.0),
        views=dataclasses.replace(
            config.views, global_views=dataclasses.replace(config.views.global_views, size_px=size_px)
        ),
        training=dataclasses.replace(
            config.training,
            images_per_step=images_per_step,
            num_steps=steps_per_epoch * epochs,
            checkpoint_every_steps=10_000,
            precision="float32",
        ),
        cluster=dataclasses.replace(config.cluster, device="cpu", renderer="cpu", batches_in_flight=4),
        tracking=dataclasses.replace(
            config.tracking, uri="none", knn_images=0, num_figure_images=0, selection_images_per_epoch=0
        ),
    )
    return Setting(config=config, steps_per_epoch=steps_per_epoch, epochs=epochs)


def requests_of(config: RunConfig) -> RequestOf:
    """Return the address of every step's batch."""
    order = build_order(config, open_dataset(config.data))
    return requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})
