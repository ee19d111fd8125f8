"""Replacement of unreadable images is deterministic, complete, journalled, and never copies a neighbour."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from hvp_ray.config import DataConfig, TransformConfig, ViewsConfig
from hvp_ray.data.source import Source
from hvp_ray.errors import DataError
from hvp_ray.recipes import get_recipe
from hvp_ray.records import BatchRequest, Proposal, ViewBatch
from hvp_ray.selection import hard_step
from hvp_ray.selection.proposals import FEATURES
from hvp_ray.stream.render_batch import RenderContext, decode_batch, finish_batch, render_batch
from hvp_ray.tracking.run_log import RunLog
from hvp_ray.tracking.unreadable_log import UnreadableLog
from hvp_ray.views.render_cpu import CpuRenderer
from tests.helpers import encode, photograph_like, views_config

VIEWS = views_config(16, TransformConfig())


class ListSource(Source):
    """Images in memory; `failures_left` reads fail first."""

    kind = "a list"
    has_labels = False

    def __init__(self, images: list[bytes], failures_left: int = 0) -> None:
        self.images = images
        self.failures_left = failures_left
        self.num_read = 0
        self.num_samples, self.num_bytes = len(images), sum(map(len, images))

    def read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        return np.full(len(self.images), -1), ()

    def fingerprint(self) -> str:
        return "list"

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        if self.failures_left:
            self.failures_left -= 1
            raise OSError("the disk is gone")
        self.num_read += len(sample_ids)
        return [self.images[sample_id] for sample_id in sample_ids]

    def describe(self, sample_id: int) -> str:
        return f"image {sample_id}"


def _images(count: int = 40, damaged: tuple[int, ...] = ()) -> list[bytes]:
    images = [encode(np.full((20, 24, 3), 5 * i, np.uint8)) for i in range(count)]
    for index in damaged:
        images[index] = images[index][:60] if index % 2 else b""
    return images


def _context(images: list[bytes], *, views: ViewsConfig = VIEWS, failures_left: int = 0) -> RenderContext:
    return RenderContext(
        seed=3,
        source=ListSource(images, failures_left),
        training_ids=np.arange(len(images)),
        data=DataConfig(source="list"),
        views=views,
        renderer=CpuRenderer(views, DataConfig(source="list")),
    )


def _request(ids: list[int], **request: object) -> BatchRequest:
    values = {"step": 1, "epoch": 0, "first_position": 8, "num_views": 2} | request
    return BatchRequest(sample_ids=np.array(ids, np.int64), **values)


def _render(images: list[bytes], ids: list[int], *, failures_left: int = 0, **request: object) -> ViewBatch:
    return render_batch(_context(images, failures_left=failures_left), _request(ids, **request))


def test_healthy_batch_is_what_was_asked_for() -> None:
    batch = _render(_images(), [4, 9, 2])
    assert batch.sample_ids.tolist() == [4, 9, 2]
    assert batch.replacements == ()
    assert batch.global_views.pixels.shape == (2, 3, 16, 16, 3)
    assert batch.heights.tolist() == [20] * 3
    assert batch.widths.tolist() == [24] * 3


def test_damaged_images_are_replaced_by_others_and_neighbours_do_not_change() -> None:
    ids = list(range(8))
    healthy, batch = _render(_images(), ids), _render(_images(damaged=(2, 5)), ids)
    assert [r.index for r in batch.replacements] == [2, 5]
    assert [r.unreadable_id for r in batch.replacements] == [2, 5]
    assert len(set(batch.sample_ids.tolist())) == 8  # no image twice
    assert not {2, 5} & set(batch.sample_ids.tolist())
    kept = [0, 1, 3, 4, 6, 7]
    assert np.array_equal(batch.global_views.pixels[:, kept], healthy.global_views.pixels[:, kept])
    for index in (2, 5):
        new_id = int(batch.sample_ids[index])
        alone = _render(_images(), [new_id])
        assert not np.array_equal(batch.global_views.plan.top[:, index], alone.global_views.plan.top[:, 0]) or (
            not np.array_equal(batch.global_views.plan.brightness[:, index], alone.global_views.plan.brightness[:, 0])
        )  # a view stream of its own


def test_same_request_gives_the_same_replacements_and_pixels() -> None:
    ids = list(range(8))
    first, second = (_render(_images(damaged=(2, 5, 20, 21, 22)), ids) for _ in range(2))
    assert first.replacements == second.replacements
    assert np.array_equal(first.global_views.pixels, second.global_views.pixels)


def test_replacement_that_is_damaged_too_is_replaced_again() -> None:
    damaged = tuple(range(40))[8:36] + (3,)
    batch = _render(_images(damaged=damaged), list(range(8)))
    assert int(batch.sample_ids[3]) in range(36, 40)
    assert batch.replacements[0].unreadable_id == 3
    for before, after in zip(batch.replacements, batch.replacements[1:], strict=False):
        assert after.unreadable_id == before.replacement_id


def test_known_decisions_are_replayed_even_where_the_image_is_readable_now() -> None:
    ids = list(range(8))
    decided = _render(_images(damaged=(2, 12, 13)), ids)
    replayed = _render(_images(), ids, known_replacements=decided.replacements)
    assert replayed.sample_ids.tolist() == decided.sample_ids.tolist()
    assert np.array_equal(replayed.global_views.pixels, decided.global_views.pixels)


def test_quarantined_image_is_never_decoded() -> None:
    batch = _render(_images(), list(range(8)), quarantined_ids=(6,))
    assert [r.unreadable_id for r in batch.replacements] == [6]


def _arrays(batch: ViewBatch) -> dict[str, NDArray[np.generic]]:
    """Everything that a trainer takes from a batch."""
    arrays = {"ids": batch.sample_ids, "heights": batch.heights, "widths": batch.widths}
    for name, views in batch.groups.items():
        plan = {"pixels": views.pixels} | views.plan.arrays()
        arrays |= {f"{name} {field}": value for field, value in plan.items()}
    return arrays


def _proposal(generator: np.random.Generator) -> Proposal:
    return Proposal(num_plans=6, coefficients=generator.normal(size=len(FEATURES)), quantile=1.0)


@pytest.mark.parametrize("recipe", ["simsiam-digits", "simclr-imagenet-r50-100ep", "ibot-digits"])
@pytest.mark.parametrize("damaged", [(), (2, 5, 9, 20, 21)])
def test_decoded_here_and_finished_there_are_the_bits_of_the_whole(
    generator: np.random.Generator, recipe: str, damaged: tuple[int, ...]
) -> None:
    """Covers photographs of all sizes, grey ones, EXIF rotation, damage, replayed decisions and a quarantined image."""
    config = get_recipe(recipe)
    images = []
    for index in range(40):
        pixels = photograph_like(generator, int(generator.integers(1, 90)), int(generator.integers(1, 90)))
        turned = Image.Exif()
        turned[ExifTags.Base.Orientation] = 6
        options = {"exif": turned} if index % 3 == 0 else {}
        images.append(encode(pixels[..., 0] if index % 5 == 0 else pixels, "JPEG", **options))
    for index in damaged:
        images[index] = images[index][: len(images[index]) // 2] if index % 2 else b""
    num_local_views = hard_step(config.selection).num_local_views
    request = _request(
        list(range(12)),
        num_local_views=num_local_views,
        quarantined_ids=(7,),
        proposal=_proposal(generator),
        num_probe_images=8,
        num_probe_views=3,
    )
    decided: list[ViewBatch] = []
    for _ in range(2):  # the second time with the first one's decisions
        whole = render_batch(_context(images, views=config.views), request)
        draft, decoded = decode_batch(_context(images, views=config.views), request)
        # What travels is read-only where it arrives.
        decoded.pixels.flags.writeable = False
        finished = finish_batch(CpuRenderer(config.views, config.data), draft, decoded)
        assert finished.replacements == whole.replacements
        expected, found = _arrays(whole), _arrays(finished)
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert draft.probes is not None
        probed = draft.probes[1].pixels.nbytes
        assert finished.shipped_bytes == decoded.pixels.nbytes + probed
        areas = whole.heights * whole.widths
        assert decoded.pixels.nbytes <= int(areas.sum()) * 3 and probed <= int(areas[:8].sum()) * 3
        assert whole.shipped_bytes == whole.num_bytes == finished.num_bytes
        decided.append(whole)
        request = dataclasses.replace(request, known_replacements=whole.replacements)
    assert len(decided[0].replacements) >= 1 + len(damaged) // 2


def test_chosen_pair_of_the_plans_is_rendered_as_these_plans_are_alone(generator: np.random.Generator) -> None:
    """Also for replacements, which have plans of their own. Different images get different places of their plans."""
    images, ids = [encode(photograph_like(generator, 40, 50)) for _ in range(40)], list(range(8))
    images[2], images[5] = b"", images[5][:60]
    proposal = _proposal(generator)
    every = _render(images, ids, num_views=6)
    chosen = _render(images, ids, proposal=proposal)
    assert chosen.replacements == every.replacements
    assert chosen.sample_ids.tolist() == every.sample_ids.tolist()
    places = set()
    for image in range(8):
        of_plan = [every.global_views.plan.view(view, image) for view in range(6)]
        views = [of_plan.index(chosen.global_views.plan.view(slot, image)) for slot in range(2)]
        assert views[0] < views[1]
        assert np.array_equal(
            chosen.global_views.pixels[:, image], every.global_views.pixels[views, image], equal_nan=False
        )
        places.add(tuple(views))
    assert len(places) > 2
    alone = [_render(images, [i], proposal=proposal).global_views.pixels[:, 0] for i in (3, 4)]
    assert np.array_equal(chosen.global_views.pixels[:, 3:5], np.stack(alone, axis=1))


def test_probe_views_are_the_first_plans_of_the_first_images_and_of_their_replacements(
    generator: np.random.Generator,
) -> None:
    images, ids = _images(damaged=(2, 5, 20, 21)), list(range(8))
    probed = _render(images, ids, proposal=_proposal(generator), num_probe_images=4, num_probe_views=3)
    every = _render(images, ids, num_views=3)
    assert probed.probe_views is not None
    assert np.array_equal(probed.probe_views.pixels, every.global_views.pixels[:, :4])
    assert np.array_equal(probed.probe_views.plan.top, every.global_views.plan.top[:, :4])
    assert probed.replacements == every.replacements
    assert probed.num_rendered_views == 2 * 8 + 3 * 4
    assert probed.shipped_bytes == probed.num_bytes == probed.num_rendered_views * 16 * 16 * 3


def test_batch_that_has_all_readable_images_repeats_some_with_other_views() -> None:
    """Ten images, of which four are damaged, and eight of them in the batch: two are new to it, and damaged as well."""
    ids = list(range(8))
    healthy, batch = _render(_images(10), ids), _render(_images(10, damaged=(0, 1, 8, 9)), ids)
    repeated = batch.sample_ids[:2].tolist()
    assert batch.sample_ids[2:].tolist() == ids[2:]
    assert np.array_equal(batch.global_views.pixels[:, 2:], healthy.global_views.pixels[:, 2:])
    assert len(set(repeated)) == 2
    assert set(repeated) <= set(ids[2:])
    plan = batch.global_views.plan
    for index, sample_id in enumerate(repeated):
        assert not np.array_equal(plan.brightness[:, index], plan.brightness[:, sample_id])
    again = _render(_images(10, damaged=(0, 1, 8, 9)), ids, known_replacements=batch.replacements)
    assert np.array_equal(again.global_views.pixels, batch.global_views.pixels)


def test_batch_of_one_readable_image_is_filled_with_it() -> None:
    batch = _render(_images(10, damaged=(0, 1, 2, *range(4, 10))), list(range(8)))
    assert batch.sample_ids.tolist() == [3] * 8
    assert {r.unreadable_id for r in batch.replacements} == {*range(10)} - {3}


@pytest.mark.parametrize("num_images", [10, 4_000])
def test_nothing_readable_is_an_error_with_the_first_image_and_its_reason(num_images: int) -> None:
    """It is raised after one round of replacements, without reading every image."""
    context = _context([b"no image"] * num_images)
    with pytest.raises(DataError, match="no readable image was found.*the first, image 3: not an image.*data.source"):
        render_batch(context, _request([3, 4, 5, 6]))
    assert isinstance(context.source, ListSource)
    assert context.source.num_read <= 10 + 4


def test_single_image_batches_survive_damage_within_the_limit() -> None:
    """The image and its first replacements are damaged: that happens once in a million batches of one at 1 %."""
    damaged = _context(_images(40))
    first = [r.replacement_id for r in render_batch(_context(_images(40, damaged=(5,))), _request([5])).replacements]
    second = render_batch(_context(_images(40, damaged=(5, *first))), _request([5]))
    assert len(second.replacements) == 2
    assert int(second.sample_ids[0]) in damaged.training_ids


def test_storage_errors_are_retried_and_then_stop_the_run() -> None:
    assert _render(_images(), [1, 2], failures_left=2).sample_ids.tolist() == [1, 2]
    with pytest.raises(DataError, match="failed 4 times: the disk is gone"):
        _render(_images(), [1, 2], failures_left=4)


def test_unreadable_log_replays_and_judges_after_a_thousand_images(tmp_path: Path) -> None:
    batch = _render(_images(damaged=(2,)), list(range(8)))
    log = UnreadableLog(RunLog(tmp_path), rank=0, images_per_rank=8, max_fraction=0.1)
    log.take(batch)
    again = UnreadableLog(RunLog(tmp_path), rank=0, images_per_rank=8, max_fraction=0.1)
    assert again.known == {1: batch.replacements}
    assert [r.place for r in again.known[1]] == ["image 2"]
    for _ in range(124):
        again.take(batch)  # 1 of 8 unreadable: 12.5 %, but not yet 1,000 images
    with pytest.raises(DataError, match=r"125 of 1000 images are unreadable \(12.5%\).*, image 2: there are no bytes"):
        again.take(batch)


def test_decisions_are_found_again_by_other_numbers_of_ranks(tmp_path: Path) -> None:
    """One rank of 8 images, then two of 4: each replays what stands at its positions, once."""
    batch = _render(_images(damaged=(2, 5, 7)), list(range(8)))
    by_index = {r.index: r for r in batch.replacements}
    assert set(by_index) == {2, 5, 7}
    one = UnreadableLog(RunLog(tmp_path), rank=0, images_per_rank=8, max_fraction=1.0)
    one.take(batch)
    log = RunLog(tmp_path, attempt=2)
    first, second = (UnreadableLog(log, rank=rank, images_per_rank=4, max_fraction=1.0) for rank in (0, 1))
    assert [(r.index, r.unreadable_id) for r in first.known[1]] == [(2, 2)]
    assert [(r.index, r.unreadable_id) for r in second.known[1]] == [(1, 5), (3, 7)]
    half = _render(_images(), [4, 5, 6, 7], known_replacements=second.known[1])
    assert half.sample_ids[1] == by_index[5].replacement_id
    second.take(half)
    assert not (log.segment / "unreadable-rank-1.jsonl").exists()  # nothing is decided twice
    assert UnreadableLog(RunLog(tmp_path), rank=0, images_per_rank=8, max_fraction=1.0).known == {1: batch.replacements}
