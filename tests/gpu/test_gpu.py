"""Test what needs a GPU. `make gpu-check` runs these too; they are skipped without a GPU."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hvp_ray.config import ClusterConfig, DataConfig, TransformConfig
from hvp_ray.costs.imaginary import made_up_batch
from hvp_ray.costs.memory import estimate_memory
from hvp_ray.distributed.world import World
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.methods.method import StepPosition
from hvp_ray.randomness import Purpose
from hvp_ray.recipes import RECIPES, get_recipe
from hvp_ray.records import ViewBatch
from hvp_ray.runs import recorder
from hvp_ray.selection import hard_step
from hvp_ray.stream.device import BATCHES_ON_DEVICE, CopyToDevice
from hvp_ray.training.step import train_step
from hvp_ray.training.trainee import build_trainee
from hvp_ray.views.downscale import downscale_views
from hvp_ray.views.plan import draw_plan
from hvp_ray.views.render_cpu import CpuRenderer
from tests.helpers import encode, photograph_like, tiny_config, views_config
from tests.unit.launch.test_devices import steps_until_the_stop_of_the_third_report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def test_dali_on_the_gpu_agrees_with_the_cpu_renderer(generator: np.random.Generator) -> None:
    from hvp_ray.views.render_dali import DaliRenderer

    views = views_config(224, TransformConfig())
    sizes = np.array([(400 + 9 * i, 520 - 7 * i) for i in range(16)], np.int32)
    images = [encode(photograph_like(generator, h, w), "JPEG", quality=92) for h, w in sizes.tolist()]
    plan = draw_plan(
        seed=0, purpose=Purpose.GLOBAL_VIEWS, epoch=0, sample_ids=np.arange(16),
        image_sizes=(sizes[:, 0].copy(), sizes[:, 1].copy()),
        num_views=4, group=views.global_views,
    )  # fmt: skip
    cpu = CpuRenderer(views, DataConfig(source="list")).render(images, plan).global_pixels
    gpu = DaliRenderer(views, DataConfig(source="list"), name="dali-gpu").render(images, plan).global_pixels
    difference = np.abs(cpu.astype(int) - gpu)
    assert difference.mean() < 1.5  # nvJPEG and libjpeg-turbo decode chroma differently
    assert (difference > 8).mean() < 0.01


def test_views_come_from_the_gpu_in_pinned_memory_and_stay_what_they_are(generator: np.random.Generator) -> None:
    from hvp_ray.views.render_dali import DaliRenderer

    views = views_config(64, TransformConfig())
    sizes = np.array([(200, 150)] * 8, np.int32)
    images = [encode(photograph_like(generator, 200, 150), "JPEG", quality=92) for _ in sizes]
    renderer = DaliRenderer(views, DataConfig(source="list"), name="dali-gpu")

    def render(epoch: int) -> np.ndarray:
        plan = draw_plan(
            seed=0, purpose=Purpose.GLOBAL_VIEWS, epoch=epoch, sample_ids=np.arange(8),
        image_sizes=(sizes[:, 0].copy(), sizes[:, 1].copy()),
            num_views=4, group=views.global_views,
        )  # fmt: skip
        return renderer.render(images, plan).global_pixels

    first = render(0)
    kept = first.copy()
    assert torch.from_numpy(first).is_pinned()
    later = [render(epoch) for epoch in range(1, 4)]
    assert np.array_equal(first, kept)
    assert not np.array_equal(first, later[0])
    assert np.array_equal(first, render(0))


def test_rendering_does_not_wait_for_the_work_of_a_trainer(generator: np.random.Generator) -> None:
    from hvp_ray.views.render_dali import DaliRenderer

    views = views_config(64, TransformConfig())
    sizes = np.array([(200, 150)] * 8, np.int32)
    images = [encode(photograph_like(generator, 200, 150), "JPEG", quality=92) for _ in sizes]
    plan = draw_plan(
        seed=0, purpose=Purpose.GLOBAL_VIEWS, epoch=0, sample_ids=np.arange(8),
        image_sizes=(sizes[:, 0].copy(), sizes[:, 1].copy()),
        num_views=4, group=views.global_views,
    )  # fmt: skip
    renderer = DaliRenderer(views, DataConfig(source="list"), name="dali-gpu")
    expected = [renderer.render(images, plan).global_pixels for _ in range(3)][-1].copy()  # builds, compiles, allocates
    torch.cuda._sleep(4_000_000_000)  # cycles: two seconds or more of the default stream, where a trainer works
    trained = torch.cuda.current_stream().record_event()
    pixels = renderer.render(images, plan).global_pixels
    assert not trained.query()
    assert np.array_equal(pixels, expected)


def test_pixels_depend_neither_on_lanes_nor_on_the_batch(generator: np.random.Generator) -> None:
    from hvp_ray.views.render_dali import DaliExecution, DaliRenderer

    views = views_config(64, TransformConfig())
    sizes = np.array([(200 + 3 * i, 150 + 5 * i) for i in range(24)], np.int32)
    images = [encode(photograph_like(generator, h, w), "JPEG", quality=92) for h, w in sizes.tolist()]

    def render(num_lanes: int, count: int) -> np.ndarray:
        plan = draw_plan(
            seed=0, purpose=Purpose.GLOBAL_VIEWS, epoch=0, sample_ids=np.arange(count),
        image_sizes=(sizes[:count, 0].copy(), sizes[:count, 1].copy()),
            num_views=4, group=views.global_views,
        )  # fmt: skip
        execution = DaliExecution(num_lanes=num_lanes)
        renderer = DaliRenderer(views, DataConfig(source="list"), name="dali-gpu", execution=execution)
        return renderer.render(images[:count], plan).global_pixels

    expected = render(1, 24)
    assert np.array_equal(render(4, 24), expected)
    assert np.array_equal(render(1, 7), expected[:, :7])


def test_views_of_a_batch_are_few_kernels(generator: np.random.Generator) -> None:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from hvp_ray.views.render_dali import DaliExecution, DaliRenderer

    views = get_recipe("simsiam-imagenet-r50-100ep").views
    sizes = np.array([(400, 500)] * 16, np.int32)
    images = [np.frombuffer(encode(photograph_like(generator, 400, 500), "JPEG"), np.uint8) for _ in sizes]
    plan = draw_plan(
        seed=0, purpose=Purpose.GLOBAL_VIEWS, epoch=0, sample_ids=np.arange(16),
        image_sizes=(sizes[:, 0].copy(), sizes[:, 1].copy()), num_views=4, group=views.global_views,
    )  # fmt: skip
    renderer = DaliRenderer(views, DataConfig(source="list"), name="dali-gpu", execution=DaliExecution())
    decoded = renderer.decode(images)
    renderer.render_decoded(decoded, plan, views.global_views)  # builds and compiles
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        renderer.render_decoded(decoded, plan, views.global_views)
    of_device = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    kernels = [name for name in of_device if not name.startswith(("Memcpy", "Memset"))]
    assert 0 < len(kernels) <= 40, kernels


def test_batches_reach_the_device_unchanged_through_the_pinned_ring(tmp_path: Path) -> None:
    from hvp_ray.config import config_to_dict
    from hvp_ray.data.dataset import open_dataset
    from hvp_ray.runs.rank import build_order
    from hvp_ray.stream.batches import requests_of_rank
    from hvp_ray.stream.render_batch import render_batch
    from hvp_ray.stream.view_worker import open_render_context

    config = tiny_config(str(tmp_path))
    context = open_render_context(config_to_dict(config), "cpu")
    requests = requests_of_rank(
        config, build_order(config, open_dataset(config.data)), rank=0, num_ranks=1, known_replacements={}
    )
    copy_to_device = CopyToDevice(torch.device("cuda", 0))
    batches: list[ViewBatch] = [render_batch(context, requests(step)) for step in range(8)]
    on_device = [copy_to_device(batch) for batch in batches]
    for batch, moved in zip(batches, on_device, strict=True):
        moved.wait()
        assert np.array_equal(moved.global_pixels.cpu().numpy(), batch.global_views.pixels)


def test_copies_that_run_ahead_of_slow_steps_take_the_memory_of_two_batches() -> None:
    """The memory of a batch is free only when the device has finished with it, not when the last reference is dropped."""
    device = torch.device("cuda", 0)
    config = get_recipe("simsiam-imagenet-r50-100ep")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, images_per_step=64))
    batch = made_up_batch(config, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    batch = dataclasses.replace(
        batch, global_views=dataclasses.replace(batch.global_views, pixels=batch.global_views.pixels.copy())
    )
    weights = torch.randn(8192, 8192, device=device)
    weights @ weights  # allocates the workspace
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["active_bytes.all.current"] + weights.nbytes  # and one product
    copy_to_device = CopyToDevice(device)
    ahead = copy_to_device(batch)
    for _ in range(6):
        in_use = ahead
        copy_to_device.release()
        ahead = copy_to_device(batch)
        in_use.wait()
        for _ in range(10):
            weights @ weights
        in_use.global_pixels.sum()
        del in_use
    peak = torch.cuda.memory_stats()["active_bytes.all.peak"]
    assert peak - before < (BATCHES_ON_DEVICE + 0.5) * batch.num_bytes


@pytest.mark.parametrize("recipe", ["simsiam-digits", "simclr-digits", "dino-digits", "ibot-digits"])
@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16"}, {"compile": True}, {"accumulation_steps": 2}])
def test_training_on_the_gpu_runs_and_learns(tmp_path: Path, recipe: str, options: dict[str, object]) -> None:
    config = tiny_config(str(tmp_path), recipe=recipe, training={"epochs": 6, **options}, cluster={"device": "cuda"})
    summary = pretrain_in_process(config)
    assert summary is not None
    assert summary["device"] == "cuda"
    assert math.isfinite(summary["loss_last"])
    assert summary["knn_top1"] > summary["knn_top1_untrained"] - 0.1


@pytest.mark.parametrize("recipe", ["simsiam-digits", "simclr-digits", "dino-digits", "ibot-digits", "dinov2-digits"])
@pytest.mark.parametrize("compiled", [False, True])
def test_step_has_no_hidden_synchronisation(tmp_path: Path, recipe: str, *, compiled: bool) -> None:
    """torch sees copies and other calls that wait, but not `_AsyncCopy.read`, which waits on purpose, for an event."""
    config = tiny_config(str(tmp_path), recipe=recipe, cluster={"device": "cuda"}, training={"compile": compiled})
    device = torch.device("cuda", 0)
    trainee = build_trainee(config, World(), device, None)
    trainee.method.train()
    batch = made_up_batch(config, lambda shape, dtype: torch.randint(0, 256, shape, dtype=dtype, device=device))
    try:
        for step in range(4):
            trainee.method.begin_step(StepPosition(step=step, num_steps=4, steps_per_epoch=2))
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps allocate and compile
            train_step(trainee, batch, config, hard_step(config.selection))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recipe", ["simsiam-digits", "simclr-digits", "dino-digits", "ibot-digits"])
def test_scoring_as_a_cuda_graph_trains_the_same_weights(tmp_path: Path, recipe: str) -> None:
    of_runs = []
    for graphs in (False, True):
        training = {"compile": True, "cuda_graphs": graphs}
        config = tiny_config(str(tmp_path), recipe=recipe, cluster={"device": "cuda"}, training=training)
        trainee = build_trainee(config, World(), torch.device("cuda", 0), None)
        trainee.method.train()
        scores = []
        for step in range(5):  # the first ones are recorded, the others replayed
            torch.manual_seed(step)
            batch = made_up_batch(config, lambda shape, dtype: torch.randint(0, 256, shape, dtype=dtype).cuda())
            trainee.method.begin_step(StepPosition(step=step, num_steps=5, steps_per_epoch=2))
            metrics = train_step(trainee, batch, config, hard_step(config.selection))
            assert metrics.scores is not None
            scores.append(metrics.scores.pairs_BP)  # read after the last step: a replay must not overwrite them
        of_runs.append((scores, list(trainee.method.state_dict().values())))
    for ours, theirs in zip(of_runs[0], of_runs[1], strict=True):
        for value, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, other)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "imagenet" in name])
def test_memory_is_the_estimated_one_within_15_percent(recipe: str) -> None:
    config = get_recipe(recipe)
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, images_per_step=32), cluster=ClusterConfig(device="cuda")
    )
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainee = build_trainee(config, World(), device, None)
    trainee.method.train()
    batch, waiting = (
        made_up_batch(config, lambda shape, dtype: torch.randint(0, 256, shape, dtype=dtype, device=device))
        for _ in range(BATCHES_ON_DEVICE)
    )
    for _ in range(2):
        train_step(trainee, batch, config, hard_step(config.selection))
    measured = torch.cuda.max_memory_allocated()
    del trainee, batch, waiting
    assert abs(estimate_memory(config).peak / measured - 1.0) < 0.15


@pytest.mark.parametrize("size_px", [112, 96, 80])
def test_views_are_scaled_as_on_a_cpu(generator: np.random.Generator, size_px: int) -> None:
    views = np.stack([photograph_like(generator, 224, 224) for _ in range(8)]).reshape(2, 4, 224, 224, 3)
    pixels = torch.from_numpy(views)
    on_gpu = downscale_views(pixels.cuda(), size_px)
    assert on_gpu.dtype == torch.uint8
    assert (on_gpu.cpu().int() - downscale_views(pixels, size_px).int()).abs().max() <= 1


def test_stop_is_noticed_between_two_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_PROGRESS_SECONDS", 0.0)
    assert steps_until_the_stop_of_the_third_report(tmp_path, torch.device("cuda", 0))[-1] == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_everything_of_a_step_is_on_the_gpu_of_its_rank(tmp_path: Path) -> None:
    """The step runs on the second GPU, while the first one stays this thread's current device."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    before = torch.cuda.memory_allocated(first)
    assert steps_until_the_stop_of_the_third_report(tmp_path, second)
    assert torch.cuda.memory_allocated(first) == before
    assert torch.cuda.max_memory_allocated(second) > 0


@pytest.mark.parametrize("recipe", ["dino-digits", "ibot-digits"])
def test_reusing_the_teachers_outputs_gives_the_same_loss(tmp_path: Path, recipe: str) -> None:
    """On a CPU losses are equal bit for bit; on a GPU, products of other sizes may round differently."""
    vit = get_recipe("ibot-digits").method.backbone
    losses = []
    for reuse in (True, False):
        config = tiny_config(str(tmp_path), recipe=recipe, selection={"reuse_teacher": reuse}, method={"backbone": vit})
        local = dataclasses.replace(config.views.local_views, size_px=4)
        config = dataclasses.replace(config, views=dataclasses.replace(config.views, local_views=local))
        trainee = build_trainee(config, World(), torch.device("cuda"), None)
        trainee.method.train()
        torch.manual_seed(0)
        batch = made_up_batch(config, lambda shape, dtype: torch.randint(0, 256, shape, dtype=dtype))
        pixels = {name: getattr(batch, name).cuda() for name in ("global_pixels", "local_pixels")}
        batch = dataclasses.replace(batch, **pixels)
        losses.append(float(train_step(trainee, batch, config, hard_step(config.selection)).loss))
    assert math.isclose(losses[0], losses[1], rel_tol=1e-5)
