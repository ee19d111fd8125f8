"""The step and the loop in one process: HVP against vanilla, controls, resume, non-finite losses."""

import copy
import dataclasses
import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hvp_ray.config import RunConfig
from hvp_ray.costs.memory import estimate_memory
from hvp_ray.data.dataset import open_dataset
from hvp_ray.distributed.world import World
from hvp_ray.errors import ConfigError, TrainingError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.methods.method import StepPosition, build_method
from hvp_ray.randomness import Purpose, draw_torch_seed
from hvp_ray.recipes import get_recipe
from hvp_ray.runs.rank import build_order
from hvp_ray.selection import hard_step, selection_at
from hvp_ray.stream.batches import InlineBatches, requests_of_rank
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.render_batch import build_render_context
from hvp_ray.tracking.run_log import ATTEMPTS, read_records
from hvp_ray.training.pixel_views import PixelViews
from hvp_ray.training.step import choose_step_views, train_step
from hvp_ray.training.trainee import build_trainee, build_untrained_method
from hvp_ray.views.normalise import normalise_views
from tests.helpers import slow_hardest_pairs, tiny_config

CPU = torch.device("cpu")
MULTI_CROP = ("dino-digits", "ibot-digits", "dinov2-digits")
VIT = get_recipe("ibot-digits").method.backbone


def with_vit_views(config: RunConfig) -> RunConfig:
    """Local views that patches of 4 px divide."""
    local = dataclasses.replace(config.views.local_views, size_px=4)
    return dataclasses.replace(config, views=dataclasses.replace(config.views, local_views=local))


def _batches(config: RunConfig, count: int) -> list[DeviceBatch]:
    dataset = open_dataset(config.data)
    context = build_render_context(config, dataset, "cpu")
    requests = requests_of_rank(config, build_order(config, dataset), rank=0, num_ranks=1, known_replacements={})
    stream = InlineBatches(context, requests, first_step=0, copy_to_device=CopyToDevice(CPU))
    return [stream.next_batch() for _ in range(count)]


def _digest(config: RunConfig, **run: Any) -> str:
    summary = pretrain_in_process(dataclasses.replace(config, run=dataclasses.replace(config.run, **run)))
    assert summary is not None
    return str(summary["weights_digest"])


def test_vanilla_arm_is_simsiam_written_out_by_hand(tmp_path: Path) -> None:
    """rule=first for 6 steps against a plain loop of torch: SGD, two forwards, cosine; bit for bit."""
    config = tiny_config(str(tmp_path), selection={"rule": "first"})
    trainee = build_trainee(config, World(), CPU, None)
    torch.manual_seed(draw_torch_seed(seed=0, purpose=Purpose.TORCH_INIT, step=0, rank=0))
    plain: Any = build_method(config.method).train()
    plain = plain.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.8 * 16 / 256, momentum=0.9, weight_decay=5e-4)
    trainee.method.train()
    for batch in _batches(config, 6):
        train_step(trainee, batch, config, hard_step(config.selection))
        x1, x2 = normalise_views(batch.global_pixels, config.views)
        z1, z2 = plain.projector(plain.backbone(x1)), plain.projector(plain.backbone(x2))
        p1, p2 = plain.predictor(z1), plain.predictor(z2)
        cosine = torch.nn.functional.cosine_similarity
        loss = -(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trainee.method.state_dict()[name]), name


def test_two_views_with_any_rule_that_scores_equal_vanilla_to_the_bit(tmp_path: Path) -> None:
    digests = {
        rule: _digest(
            tiny_config(str(tmp_path), selection={"rule": rule, "num_views": 2}, training={"epochs": 1}), name=rule
        )
        for rule in ("first", "hardest", "easiest", "min_iou", "random", "all_pairs")
    }
    assert len(set(digests.values())) == 1, digests
    four = tiny_config(str(tmp_path), selection={"rule": "first", "num_views": 4}, training={"epochs": 1})
    assert _digest(four, name="four") == digests["first"]
    other_seed = _digest(four, name="seed", seed=1)
    assert other_seed != digests["first"]


def test_vanilla_views_are_candidates_0_and_1_of_the_hard_run(tmp_path: Path) -> None:
    hard = _batches(tiny_config(str(tmp_path)), 15)
    vanilla = _batches(tiny_config(str(tmp_path), selection={"rule": "first"}), 15)
    for h, v in zip(hard, vanilla, strict=True):
        assert h.global_pixels.shape[0] == 4
        assert v.global_pixels.shape[0] == 2
        assert torch.equal(h.global_pixels[:2], v.global_pixels)


def test_step_trains_on_the_pairs_that_the_papers_loop_chooses(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), training={"images_per_step": 64})
    trainee = build_trainee(config, World(), CPU, None)
    trainee.method.train()
    for batch in _batches(config, 2):
        twin = build_method(config.method)
        twin.load_state_dict(trainee.method.state_dict())
        twin.train()
        with torch.no_grad():
            z = twin.projector(twin.backbone(normalise_views(batch.global_pixels, config.views).flatten(0, 1)))
            p = twin.predictor(z)
        shape = (4, 64, -1)
        expected = slow_hardest_pairs(z.reshape(shape).double().numpy(), p.reshape(shape).double().numpy())
        metrics = train_step(trainee, batch, config, hard_step(config.selection))
        assert [tuple(pair) for pair in metrics.selection.view_indices.T.tolist()] == expected


def test_every_second_step_is_vanilla_and_renders_two_views(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), selection={"every": 2})
    batches = _batches(config, 4)
    assert [batch.global_pixels.shape[0] for batch in batches] == [4, 2, 4, 2]
    trainee = build_trainee(config, World(), CPU, None)
    metrics = [train_step(trainee, batch, config, selection_at(config.selection, batch.step, 4)) for batch in batches]
    assert [m.scores is not None for m in metrics] == [True, False, True, False]


def test_scoring_always_changes_nothing_but_faithful_statistics(tmp_path: Path) -> None:
    """The control: extra views that only BatchNorm sees."""
    base = {"rule": "first"}
    control = tiny_config(
        str(tmp_path), selection=base | {"score_always": True, "scoring_batch_norm": "faithful"}, training={"epochs": 1}
    )
    silent = tiny_config(str(tmp_path), selection=base | {"score_always": True}, training={"epochs": 1})
    plain = tiny_config(str(tmp_path), selection=base, training={"epochs": 1})
    assert _digest(silent, name="silent") == _digest(plain, name="plain")
    assert _digest(control, name="control") != _digest(plain, name="plain")


def test_scoring_resolution_is_antialiased_and_costs_nothing_at_full_size(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), recipe="ibot-digits")
    pixels = PixelViews(
        global_pixels=torch.randint(0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8),
        local_pixels=torch.randint(0, 256, (4, 3, 8, 8, 3), dtype=torch.uint8),
        masks=torch.zeros(2, 3, 4, 4, dtype=torch.bool),
    )
    pixels.masks[0, 0, :2, :2] = pixels.masks[0, 0, 2, 2] = True
    assert pixels.for_scoring(config.selection, config.views, patch_px=4) is pixels
    assert pixels.normalised(config.views).max_masked_patches == config.views.masks.max_cells(16)

    def at(resolution_px: int) -> PixelViews:
        selection = dataclasses.replace(config.selection, scoring_resolution_px=resolution_px)
        return pixels.for_scoring(selection, config.views, patch_px=4)

    assert at(16) is pixels
    small = at(8)
    assert small.global_pixels.shape == (2, 3, 8, 8, 3)
    assert small.local_pixels.shape == (4, 3, 4, 4, 3)
    assert small.global_pixels.float().std() < pixels.global_pixels.float().std() * 0.7  # noise is averaged, not picked
    # A cell stands for 2 x 2 of the full mask: masked where at least half of them were.
    assert small.masks[0, 0].tolist() == [[True, False], [False, False]]
    inputs = small.normalised(config.views)
    assert inputs.max_masked_patches is None
    assert inputs.global_views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)  # fast in convolutions


@pytest.mark.parametrize("recipe", MULTI_CROP)
@pytest.mark.parametrize("parts", [1, 2])
def test_reusing_the_teachers_outputs_changes_no_bit(tmp_path: Path, recipe: str, parts: int) -> None:
    """Against forwarding the chosen views again, over three steps; the forward passes that are saved are counted."""
    states, forwarded = [], []
    for reuse in (True, False):
        config = tiny_config(
            str(tmp_path),
            recipe=recipe,
            selection={"reuse_teacher": reuse},
            training={"accumulation_steps": parts},
            method={"backbone": VIT},
            data={"num_images": 60},
        )
        config = with_vit_views(config)
        trainee = build_trainee(config, World(), CPU, None)
        trainee.method.train()
        images: list[int] = []
        trainee.method.teacher_backbone.patch_embed.register_forward_hook(
            lambda _, inputs, __, seen=images: seen.append(len(inputs[0]))
        )
        for step, batch in enumerate(_batches(config, 3)):
            trainee.method.begin_step(StepPosition(step=step, num_steps=3, steps_per_epoch=3))
            train_step(trainee, batch, config, hard_step(config.selection))
        states.append(trainee.method.state_dict())
        forwarded.append(sum(images))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    views = config.selection.num_global_views
    assert forwarded == [3 * views * 16, 3 * (views + 2) * 16]


@pytest.mark.parametrize("recipe", MULTI_CROP)
def test_checkpointed_activations_change_no_bit_and_save_memory(tmp_path: Path, recipe: str) -> None:
    """With drop path, bfloat16 and two parts a step; the blocks of the student are forwarded once more."""
    backbone = dataclasses.replace(get_recipe(recipe).method.backbone, depth=4, drop_path=0.3)
    if recipe == "dino-digits":
        backbone = dataclasses.replace(VIT, depth=4, drop_path=0.3)
    states, forwarded, estimates = [], [], []
    for checkpointing in (False, True):
        training = {"accumulation_steps": 2, "precision": "bfloat16", "activation_checkpointing": checkpointing}
        config = tiny_config(
            str(tmp_path), recipe=recipe, training=training, method={"backbone": backbone}, data={"num_images": 60}
        )
        config = with_vit_views(config)
        estimates.append(estimate_memory(config))
        trainee = build_trainee(config, World(), CPU, None)
        trainee.method.train()
        calls: list[int] = []
        trainee.method.backbone.blocks[0].attn.register_forward_hook(
            lambda _, __, output, seen=calls: seen.append(len(output)) if torch.is_grad_enabled() else None
        )
        for step, batch in enumerate(_batches(config, 3)):
            trainee.method.begin_step(StepPosition(step=step, num_steps=3, steps_per_epoch=3))
            train_step(trainee, batch, config, hard_step(config.selection))
        states.append(trainee.method.state_dict())
        forwarded.append(sum(calls))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert forwarded[1] == 2 * forwarded[0]
    assert estimates[1].training_peak < estimates[0].training_peak and estimates[1].weights == estimates[0].weights


def test_checkpointed_activations_are_refused_with_batch_norm(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), training={"activation_checkpointing": True})
    with pytest.raises(ConfigError, match="not allowed with ResNet: its BatchNorm would count every batch twice"):
        build_untrained_method(config)


@pytest.mark.parametrize(
    "selection",
    [{"scoring_resolution_px": 4}, {"scoring_precision": "bfloat16"}, {"reuse_teacher": False}],
    ids=["small", "bfloat16", "off"],
)
def test_teacher_is_not_reused_where_scoring_forwards_other_views(tmp_path: Path, selection: dict[str, Any]) -> None:
    config = with_vit_views(
        tiny_config(str(tmp_path), recipe="dino-digits", selection=selection, method={"backbone": VIT})
    )
    trainee = build_trainee(config, World(), CPU, None)
    assert choose_step_views(trainee, _batches(config, 1)[0], config, hard_step(config.selection)).pixels.reusable == {}


def test_teacher_with_batch_norm_is_not_reused(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), recipe="dino-digits")  # a ResNet
    trainee = build_trainee(config, World(), CPU, None)
    trainee.method.train()
    assert choose_step_views(trainee, _batches(config, 1)[0], config, hard_step(config.selection)).pixels.reusable == {}


@pytest.mark.parametrize("recipe", [*MULTI_CROP, "simclr-digits", "simsiam-digits"])
def test_reusing_the_students_rows_changes_no_bit(tmp_path: Path, recipe: str) -> None:
    """Against forwarding the chosen views again, over three steps; reuse needs fewer operations.

    SimSiam forwards its slots one after the other, and the backward of both at once rounds differently.
    """
    states, operations = [], []
    for reuse in (True, False):
        config = tiny_config(
            str(tmp_path),
            recipe=recipe,
            selection={"reuse_student": reuse},
            method={"backbone": dataclasses.replace(VIT, drop_path=0.0)},
            data={"num_images": 60},
        )
        if recipe in MULTI_CROP:
            config = with_vit_views(config)
        trainee = build_trainee(config, World(), CPU, None)
        trainee.method.train()
        for step, batch in enumerate(_batches(config, 3)):
            trainee.method.begin_step(StepPosition(step=step, num_steps=3, steps_per_epoch=3))
            with FlopCounterMode(display=False) if step == 2 else nullcontext() as counter:
                train_step(trainee, batch, config, hard_step(config.selection))
        operations.append(counter.get_total_flops())
        states.append(trainee.method.state_dict())
    assert operations[0] < 0.9 * operations[1]
    if recipe == "simsiam-digits":
        torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-5)
    else:
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("recipe", ["ibot-digits", "simclr-digits"])
def test_reuse_of_checkpointed_activations_keeps_inputs_of_blocks_and_changes_no_bit(
    tmp_path: Path, recipe: str
) -> None:
    states, peaks = [], []
    for reuse, checkpointing in ((True, True), (True, False), (False, False)):
        config = tiny_config(
            str(tmp_path),
            recipe=recipe,
            selection={"reuse_student": reuse},
            training={"activation_checkpointing": checkpointing},
            method={"backbone": dataclasses.replace(VIT, depth=4, drop_path=0.0)},
            data={"num_images": 60},
        )
        if recipe in MULTI_CROP:
            config = with_vit_views(config)
        peaks.append(estimate_memory(config).peak)
        trainee = build_trainee(config, World(), CPU, None)
        trainee.method.train()
        for step, batch in enumerate(_batches(config, 3)):
            trainee.method.begin_step(StepPosition(step=step, num_steps=3, steps_per_epoch=3))
            train_step(trainee, batch, config, hard_step(config.selection))
        states.append(trainee.method.state_dict())
    assert peaks[0] < 0.9 * peaks[1]
    for state in states[:2]:
        assert all(torch.equal(value, state[key]) for key, value in states[2].items())


def test_drop_path_of_reused_rows_is_that_of_scoring(tmp_path: Path) -> None:
    """Its numbers are drawn by (seed, step, rank), so a step that is run again gives the same bits."""
    digests = []
    for _ in range(2):
        config = tiny_config(
            str(tmp_path), recipe="ibot-digits", selection={"reuse_student": True}, data={"num_images": 60}
        )
        assert config.method.backbone.drop_path > 0.0
        trainee = build_trainee(config, World(), CPU, None)
        trainee.method.train()
        batch = _batches(config, 1)[0]
        scores = choose_step_views(trainee, batch, config, hard_step(config.selection)).scores
        metrics = train_step(trainee, batch, config, hard_step(config.selection))
        assert scores is not None
        assert metrics.scores is not None
        assert torch.equal(scores.pairs_BP, metrics.scores.pairs_BP)
        assert torch.allclose(metrics.loss, metrics.selection.scores.mean(), rtol=1e-5)  # scoring=full: the very loss
        digests.append(trainee.method.state_dict())
    assert all(torch.equal(value, digests[1][key]) for key, value in digests[0].items())


def test_student_with_batch_norm_is_not_reused(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), selection={"reuse_student": True})  # a ResNet
    with pytest.raises(ConfigError, match="reuse_student=True is not allowed with this encoder.*BatchNorm"):
        build_trainee(config, World(), CPU, None)


def test_low_resolution_scoring_and_clipping_train(tmp_path: Path) -> None:
    config = tiny_config(
        str(tmp_path), selection={"scoring_resolution_px": 8}, views={}, optimizer={"clip_gradient_norm": 0.5}
    )
    trainee = build_trainee(config, World(), CPU, None)
    metrics = train_step(trainee, _batches(config, 1)[0], config, hard_step(config.selection))
    assert metrics.gradient_norm is not None
    assert math.isfinite(float(metrics.gradient_norm))


def test_non_finite_loss_stops_before_the_update(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path))
    trainee = build_trainee(config, World(), CPU, None)
    with torch.no_grad():
        trainee.method.projector[0].weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in trainee.method.named_parameters()}
    with pytest.raises(TrainingError, match="step 0 is nan"):
        train_step(trainee, _batches(config, 1)[0], config, hard_step(config.selection))
    for name, value in trainee.method.named_parameters():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("recipe", ["simclr-digits", *MULTI_CROP])
def test_every_method_with_one_candidate_equals_vanilla_to_the_bit(tmp_path: Path, recipe: str) -> None:
    """Vision Transformers with drop path included: scoring draws random numbers of its own and leaves no trace."""
    if recipe in MULTI_CROP:
        one = {"num_global_views": 2, "num_local_views": 2}
        many = {"num_global_views": 4, "num_local_views": 4}
    else:
        one, many = {"num_views": 2}, {"num_views": 4}
    states = {}
    for name, selection in {
        "vanilla": {"rule": "first"} | one,
        "vanilla of many": {"rule": "first"} | many,
        "hardest": {"rule": "hardest"} | one,
        "limited": {"rule": "hardest", "limit": 3} | one,
        "random": {"rule": "random"} | one,
        "all pairs": {"rule": "all_pairs", "weighting": "softmax"} | one,
        "hardest of many": {"rule": "hardest"} | many,
    }.items():
        config = tiny_config(str(tmp_path), recipe=recipe, selection=selection, data={"num_images": 60})
        if recipe == "dino-digits":
            config = with_vit_views(
                dataclasses.replace(config, method=dataclasses.replace(config.method, backbone=VIT))
            )
        trainee = build_trainee(config, World(), CPU, None)
        trainee.method.train()
        drop_paths = [m for m in trainee.method.modules() if type(m).__name__ == "DropPath" and m.drop_prob > 0]
        assert bool(drop_paths) == (recipe in MULTI_CROP)
        for step, batch in enumerate(_batches(config, 3)):
            trainee.method.begin_step(StepPosition(step=step, num_steps=3, steps_per_epoch=3))
            train_step(trainee, batch, config, hard_step(config.selection))
        states[name] = trainee.method.state_dict()
    for name in ("vanilla of many", "hardest", "limited", "random", "all pairs", "hardest of many"):
        same = all(torch.equal(value, states["vanilla"][key]) for key, value in states[name].items())
        assert same == (name != "hardest of many"), name


@pytest.mark.parametrize("recipe", MULTI_CROP)
def test_slots_keep_their_transforms_and_masks_stay_with_their_views(tmp_path: Path, recipe: str) -> None:
    """Even and odd views differ in brightness here, so a slot shows which one it holds; a mask is told by its plan."""
    config = tiny_config(str(tmp_path), recipe=recipe, data={"num_images": 60})
    even = config.views.global_views.even
    group = dataclasses.replace(
        config.views.global_views,
        even=dataclasses.replace(even, solarize_probability=0.0),
        odd=dataclasses.replace(even, solarize_probability=1.0),
    )
    config = dataclasses.replace(config, views=dataclasses.replace(config.views, global_views=group))
    trainee = build_trainee(config, World(), CPU, None)
    trainee.method.train()
    changed = 0
    for batch in _batches(config, 3):
        plan = batch.global_views.plan
        assert plan.solarize.all(axis=1).tolist() == [False, True, False, True]
        metrics = train_step(trainee, batch, config, hard_step(config.selection))
        slots = metrics.selection.view_indices
        assert (slots[0] % 2 == 0).all()
        assert (slots[1] % 2 == 1).all()
        changed += int((slots != torch.tensor([[0], [1]])).sum())
        chosen = PixelViews.of(batch).gather(metrics.selection)
        for slot in range(2):
            for image in range(16):
                view = int(slots[slot, image])
                assert torch.equal(chosen.global_pixels[slot, image], batch.global_pixels[view, image])
                if plan.mask is not None:
                    assert np.array_equal(chosen.masks[slot, image].numpy(), plan.mask[view, image])
        assert metrics.selection.local_indices.shape == (2, 16)
        assert (metrics.selection.local_indices.diff(dim=0) > 0).all()
    assert changed > 0


def test_chosen_candidate_is_no_easier_than_any_other(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), recipe="ibot-digits", data={"num_images": 60})
    trainee = build_trainee(config, World(), CPU, None)
    trainee.method.train()
    for batch in _batches(config, 2):
        metrics = train_step(trainee, batch, config, hard_step(config.selection))
        assert metrics.scores is not None
        best = metrics.scores.best_of_pairs(2)
        torch.testing.assert_close(metrics.selection.scores, best.max(dim=1).values)


@pytest.mark.parametrize("selection", [{"rule": "first"}, {"rule": "all_pairs", "weighting": "softmax"}])
@pytest.mark.parametrize("recipe", ["simsiam-digits", "simclr-digits", "dino-digits", "ibot-digits"])
def test_accumulated_step_is_the_whole_step(tmp_path: Path, recipe: str, selection: dict[str, Any]) -> None:
    """A network without batch statistics and drop path: four parts give loss, gradient, centre and teacher of one.

    Not DINOv2: Sinkhorn-Knopp balances a part, and KoLeo's neighbours are in it.
    """
    patch_px = 4 if recipe == "ibot-digits" else 2
    transformer = dataclasses.replace(VIT, dim=32, depth=2, num_heads=2, drop_path=0.0, patch_px=patch_px)
    method = dataclasses.replace(get_recipe(recipe).method, backbone=transformer)
    states, losses = [], []
    for parts in (1, 4):
        config = tiny_config(
            str(tmp_path),
            recipe=recipe,
            selection=selection,
            training={"accumulation_steps": parts},
            data={"num_images": 60},
        )
        config = dataclasses.replace(config, method=method)
        trainee = build_trainee(config, World(), CPU, None)
        for layer in trainee.method.modules():
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.eval()
        optimizer = torch.optim.SGD(trainee.method.parameters(), lr=0.1)
        trainee = dataclasses.replace(trainee, optimizer=optimizer)
        losses.append(
            [
                float(train_step(trainee, batch, config, hard_step(config.selection)).loss)
                for batch in _batches(config, 2)
            ]
        )
        states.append(trainee.method.state_dict())
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("recipe", ["simsiam-digits", "simclr-digits", *MULTI_CROP])
def test_bfloat16_is_for_the_networks_only(tmp_path: Path, recipe: str) -> None:
    """Autocast reaches forward and scoring; scores, losses, centres and weights stay float32, and near those of it."""
    config = tiny_config(str(tmp_path), recipe=recipe, data={"num_images": 60})
    losses = []
    for precision in ("float32", "bfloat16"):
        training = dataclasses.replace(config.training, precision=precision)
        trainee = build_trainee(dataclasses.replace(config, training=training), World(), CPU, None)
        trainee.method.train()
        (batch,) = _batches(config, 1)
        metrics = train_step(
            trainee, batch, dataclasses.replace(config, training=training), hard_step(config.selection)
        )
        assert metrics.scores is not None
        assert {metrics.loss.dtype, metrics.scores.pairs_BP.dtype} == {torch.float32}
        assert {value.dtype for value in trainee.method.state_dict().values()} <= {torch.float32, torch.int64}
        losses.append(float(metrics.loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.02)
    assert losses[1] != losses[0]


def test_faithful_batch_norm_counts_three_forwards_a_hard_step_and_two_a_vanilla_one(tmp_path: Path) -> None:
    for rule, every, counts in (("hardest", 1, [3, 6]), ("hardest", 2, [3, 5]), ("first", 1, [2, 4])):
        config = tiny_config(str(tmp_path), selection={"rule": rule, "every": every, "scoring_batch_norm": "faithful"})
        trainee = build_trainee(config, World(), CPU, None)
        trainee.method.train()
        counted = []
        for batch in _batches(config, 2):
            train_step(trainee, batch, config, selection_at(config.selection, batch.step, 2))
            counted.append(int(trainee.method.backbone.bn1.num_batches_tracked))
        assert counted == counts


def test_dropout_is_addressed_by_step_and_rank(tmp_path: Path) -> None:
    """A network with dropout: two views equal vanilla, although scoring draws random numbers too."""
    digests = []
    for rule in ("first", "hardest"):
        config = tiny_config(str(tmp_path), selection={"rule": rule, "num_views": 2})
        trainee = build_trainee(config, World(), CPU, None)
        trainee.method.projector.insert(1, torch.nn.Dropout(0.5))
        for batch in _batches(config, 3):
            train_step(trainee, batch, config, hard_step(config.selection))
        digests.append(np.concatenate([p.detach().flatten().numpy() for p in trainee.method.parameters()]))
    assert np.array_equal(digests[0], digests[1])


def test_weighting_begins_with_the_schedule_and_rises_along_the_ramp(tmp_path: Path) -> None:
    """All pairs of 8 steps: the mean to the bit before the start, then weights that leave fewer and fewer pairs."""
    states, effective = [], []
    for schedule in ({}, {"weighting": "softmax", "start_fraction": 0.25, "ramp_fraction": 0.5}):
        config = tiny_config(str(tmp_path), selection={"rule": "all_pairs"} | schedule)
        trainee = build_trainee(config, World(), CPU, None)
        trainee.method.train()
        for step, batch in enumerate(_batches(config, 8)):
            metrics = train_step(trainee, batch, config, selection_at(config.selection, step, 8))
            effective.append(float(metrics.measurements.get("selection/effective_pairs", math.nan)))
            if step in (2, 3):  # the ramp_position of step 2 is 0 yet
                states.append(copy.deepcopy(trainee.method.state_dict()))
    assert all(torch.equal(value, states[2][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[3][name]) for name, value in states[1].items())
    plain, weighted = effective[:8], effective[8:]
    assert np.isnan(plain + weighted[:3]).all()
    assert weighted[3] > 5.5 > weighted[6] > 1.0
    assert (np.diff(weighted[3:7]) < 0).all()


def test_run_in_process_resumes_to_the_same_bits_and_journals_each_step_once(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path))
    straight = _digest(config, name="straight")
    last = tmp_path / "straight" / "checkpoints"
    assert sorted(path.name for path in last.iterdir()) == ["step-00000016", "step-00000020"]

    run = dataclasses.replace(config, run=dataclasses.replace(config.run, name="resumed"))
    pretrain_in_process(run)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000020")
    (tmp_path / "resumed" / "summary.json").unlink()
    summary = pretrain_in_process(run)
    assert summary is not None
    assert summary["num_resumes"] == 1
    assert summary["weights_digest"] == straight
    steps = [json.loads(line)["step"] for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))


RAMP = {"rule": "hardest", "start_fraction": 0.3, "ramp_fraction": 0.6}
"""Step 6, from which the run below resumes, is in the middle of its ramp."""
RESCUE = {"rule": "hardest", "rescue_share": 0.5}


@pytest.mark.parametrize("selection", [{"rule": "hardest"}, {"rule": "first"}, RAMP, RESCUE])
@pytest.mark.parametrize("recipe", ["simclr-digits", *MULTI_CROP])
def test_every_method_resumes_to_the_same_bits(tmp_path: Path, recipe: str, selection: dict[str, Any]) -> None:
    """Teacher, centres, momenta and schedules come back from a checkpoint in mid-epoch."""
    check_resume(tmp_path, recipe, selection=selection)


@pytest.mark.parametrize("recipe", ["simclr-digits", "ibot-digits"])
def test_runs_that_reuse_rows_resume_to_the_same_bits(tmp_path: Path, recipe: str) -> None:
    """With drop path, which scoring draws."""
    assert VIT.drop_path > 0.0
    check_resume(tmp_path, recipe, selection={"reuse_student": True}, method={"backbone": VIT})


def check_resume(tmp_path: Path, recipe: str, **sections: dict[str, object]) -> None:
    """Compare a run that resumes from step 6 of 9 with one that does not stop."""
    config = tiny_config(
        str(tmp_path),
        recipe=recipe,
        data={"num_images": 100},
        training={"num_steps": 9, "checkpoint_every_steps": 3},
        tracking={"knn_images": 0},
        **sections,
    )
    straight = _digest(config, name="straight")
    run = dataclasses.replace(config, run=dataclasses.replace(config.run, name="resumed"))
    pretrain_in_process(run)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000009")
    (tmp_path / "resumed" / "summary.json").unlink()
    summary = pretrain_in_process(run)
    assert summary is not None
    assert [r["step"] for r in read_records(tmp_path / "resumed", ATTEMPTS, dropped=True)][-1] == 6
    assert summary["weights_digest"] == straight


def test_initial_weights_of_a_run_are_the_start_of_another(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), training={"epochs": 1})
    _digest(config, name="first")
    second = tiny_config(str(tmp_path), training={"epochs": 1, "initial_weights": str(tmp_path / "first")})
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "first" / "backbone.safetensors")
    backbone = build_untrained_method(second).backbone
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, weights[name])
