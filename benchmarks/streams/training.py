"""A trainer that really trains: the product's loop and step, fed from one cached batch, inline, or by the whole product.

Small enough for CPUs: a ResNet of 10 layers. The trainer has one thread, so rendering has the other cores.
"""

import dataclasses

import torch

from benchmarks.streams.setting import Setting, requests_of
from hvp_ray.config import RunConfig, config_to_dict
from hvp_ray.distributed.world import World
from hvp_ray.stream.batches import BatchStream, InlineBatches
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.render_batch import open_render_context, render_batch
from hvp_ray.stream.stats import StreamStats
from hvp_ray.training.loop import run_loop
from hvp_ray.training.step import StepMetrics
from hvp_ray.training.trainee import Trainee, build_trainee

CPU = torch.device("cpu")


class CachedBatches:
    """A stream of one batch, again and again."""

    def __init__(self, batch: DeviceBatch) -> None:
        self._batch = batch
        self.stats = StreamStats()

    def next_batch(self) -> DeviceBatch:
        self.stats.record_wait(0.0)
        return self._batch

    def close(self) -> None: ...


class SilentObserver:
    """Hears nothing and wants nothing."""

    def before_step(self, batch: DeviceBatch) -> None: ...
    def after_step(self, steps_done: int, batch: DeviceBatch, metrics: StepMetrics, learning_rate: float) -> None: ...
    def save_checkpoint(self, steps_done: int) -> None: ...
    def stop_requested(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSpeed:
    """What a trainer did from the first batch in hand on."""

    images_per_second: float
    wait_fraction: float
    first_batch_seconds: float


def with_small_network(setting: Setting, backbone: str) -> RunConfig:
    """Return the run of a setting with another backbone."""
    config = setting.config
    method = config.method
    method = dataclasses.replace(method, backbone=dataclasses.replace(method.backbone, name=backbone))
    training = dataclasses.replace(config.training, torch_threads=1)
    return dataclasses.replace(config, method=method, training=training)


def first_batch(config: RunConfig) -> DeviceBatch:
    """Render the batch of step 0 in this process."""
    context = open_render_context(config_to_dict(config), "cpu")
    return CopyToDevice(CPU)(render_batch(context, requests_of(config)(0)))


def inline_batches(config: RunConfig) -> InlineBatches:
    """Return the product's stream that renders in this process."""
    context = open_render_context(config_to_dict(config), "cpu")
    return InlineBatches(context, requests_of(config), first_step=0, copy_to_device=CopyToDevice(CPU))


def train(trainee: Trainee, stream: BatchStream, config: RunConfig, steps: int) -> TrainingSpeed:
    """Train; the speed is what a run's summary calls it."""
    result = run_loop(trainee, stream, config, SilentObserver(), first_step=0, num_steps=steps, steps_per_epoch=steps)
    return TrainingSpeed(
        images_per_second=config.training.images_per_step * steps / result.train_seconds,
        wait_fraction=stream.stats.wait_seconds / result.train_seconds,
        first_batch_seconds=stream.stats.first_batch_seconds,
    )


def training_headroom(config: RunConfig, steps: int) -> TrainingSpeed:
    """Return what the trainer does when views cost nothing and are there."""
    return train(build_trainee(config, World(), CPU, None), CachedBatches(first_batch(config)), config, steps)


def training_inline(config: RunConfig, steps: int) -> TrainingSpeed:
    """Return what the trainer does when it renders itself."""
    return train(build_trainee(config, World(), CPU, None), inline_batches(config), config, steps)


def training_launched(config: RunConfig, steps: int, num_workers: int) -> tuple[TrainingSpeed, float]:
    """Run the product as `pretrain.py` does, on the Ray of this process; return its summary's figures and spilled bytes."""
    from hvp_ray.launch.driver import launch
    from hvp_ray.launch.watch import Watchers

    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=f"stream-benchmark-{num_workers}"),
        training=dataclasses.replace(config.training, num_steps=steps),
        cluster=dataclasses.replace(config.cluster, num_view_workers=num_workers),
    )
    quiet = Watchers(announce=lambda _: None, show_progress=lambda _: None, show_message=lambda _: None)
    summary, _ = launch(config, quiet)
    speed = TrainingSpeed(
        images_per_second=summary["images_per_second"],
        wait_fraction=summary["data_wait_fraction"],
        first_batch_seconds=summary["first_batch_seconds"],
    )
    return speed, summary["spilled_bytes"]
