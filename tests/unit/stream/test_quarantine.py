"""Images that crash a decoder are found in a batch and among its replacements; a broken child condemns no image."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.config import DataConfig, TransformConfig
from hvp_ray.errors import StageError
from hvp_ray.records import BatchRequest
from hvp_ray.stream.quarantine import CRASHES_DECODER, DECODER, failures_apart
from hvp_ray.stream.render_batch import RenderContext, decode_batch, find_crashing_ids, render_batch
from hvp_ray.views.render_cpu import CpuRenderer
from tests.helpers import encode, views_config
from tests.unit.stream.test_render_batch import ListSource

DYING_DECODER = "tests.unit.stream.dying_decoder:can_decode_or_die"
DYING_JPEG_DECODER = Path(__file__).parents[2] / "ray" / "dying_decoder"
DATA = DataConfig(source="list", max_image_pixels=10)
VIEWS = views_config(16, TransformConfig())

WORDS = "tests.unit.stream.dying_decoder:can_decode_by_word"


def _crashing(images: list[bytes], *, decoder: str = WORDS, timeout_seconds: float = 60.0) -> list[int]:
    failures = failures_apart(images, DATA, decoder=decoder, timeout_seconds=timeout_seconds, start_pauses=())
    return [index for index, reason in failures.items() if reason == CRASHES_DECODER]


def test_crashing_images_are_found_among_healthy_and_damaged_ones() -> None:
    images = [b"fine", b"crash 1", b"raise", b"fine", b"exit", b"fine"]
    assert _crashing(images) == [1, 4]
    failures = failures_apart(images, DATA, decoder=WORDS)
    assert failures == {1: CRASHES_DECODER, 2: "cannot be decoded", 4: CRASHES_DECODER}


def test_real_decoder_crashes_on_nothing() -> None:
    assert _crashing([b"", b"no image", b"\xff\xd8\xff"], decoder=DECODER) == []


def test_image_that_hangs_the_decoder_is_found() -> None:
    assert _crashing([b"fine", b"hang", b"fine"], timeout_seconds=0.5) == [1]


def test_what_a_library_prints_is_no_sign_of_life() -> None:
    assert _crashing([b"chatter", b"fine", b"crash"]) == [2]


def test_image_at_which_a_stranger_killed_the_process_is_innocent(tmp_path: Path) -> None:
    """The out-of-memory killer may strike twice in a row, also while the image is decoded alone."""
    counter = tmp_path / "kills"
    counter.touch()
    assert _crashing([b"fine", b"twice:" + os.fsencode(counter), b"crash"]) == [2]
    assert counter.read_bytes() == b".."


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ImportError('libjpeg.so.8 is missing')", "exit status 1.*libjpeg.so.8 is missing"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_child_that_dies_while_it_starts_condemns_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    (tmp_path / "broken_decoder.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StageError, match=f"(?s)could not start.*{reason}"):
        _crashing([b"fine", b"fine"], decoder="broken_decoder:decode")


def test_child_that_cannot_be_made_condemns_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StageError, match="search for images.*failed.*No such file"):
        _crashing([b"fine"])


def test_child_that_is_terminated_condemns_no_image() -> None:
    with pytest.raises(StageError, match="was ended from outside.*SIGTERM"):
        _crashing([b"fine", b"ended"])


def _context(*, damaged: tuple[int, ...] = (), crashing: tuple[int, ...] = ()) -> RenderContext:
    images = [encode(np.full((20, 24, 3), 5 * i, np.uint8)) for i in range(40)]
    for index in damaged:
        images[index] = b"damaged"
    for index in crashing:
        images[index] += b"crash"
    return RenderContext(
        seed=3,
        source=ListSource(images),
        training_ids=np.arange(len(images)),
        data=DataConfig(source="list"),
        views=VIEWS,
        renderer=CpuRenderer(VIEWS, DataConfig(source="list")),
    )


def _request(quarantined_ids: tuple[int, ...] = ()) -> BatchRequest:
    return BatchRequest(
        step=1,
        epoch=0,
        first_position=8,
        sample_ids=np.arange(8, dtype=np.int64),
        num_views=2,
        quarantined_ids=quarantined_ids,
    )


def _find(context: RenderContext, request: BatchRequest) -> list[int]:
    return list(find_crashing_ids(context, request, decoder=DYING_DECODER))


def test_crashing_images_of_a_batch_are_found_and_nothing_else_is() -> None:
    context = _context(damaged=(1, 2), crashing=(3, 6, 30))
    assert _find(context, _request()) == [3, 6]
    assert _find(context, _request(quarantined_ids=(3, 6))) == []


def test_crashing_image_that_would_replace_a_damaged_one_is_found() -> None:
    """It is not in the batch. After its quarantine the next candidate takes the place and crashes too."""
    damaged = _context(damaged=(2, 5))
    replaced_by = {r.index: r.replacement_id for r in render_batch(damaged, _request()).replacements}
    first = replaced_by[5]
    context = _context(damaged=(2, 5), crashing=(first,))
    assert _find(context, _request()) == [first]

    second = int(render_batch(context, _request(quarantined_ids=(first,))).sample_ids[5])
    assert second not in (*range(8), first, replaced_by[2])
    context = _context(damaged=(2, 5), crashing=(first, second))
    assert _find(context, _request(quarantined_ids=(first,))) == [second]


def test_quarantine_and_damage_of_an_image_give_the_same_batch() -> None:
    """Of the batch that has it, and of one that it would be drawn for."""
    replacement = int(render_batch(_context(damaged=(2,)), _request()).sample_ids[2])
    for unreadable in (4, replacement):
        damaged = render_batch(_context(damaged=(2, unreadable)), _request())
        quarantined = render_batch(_context(damaged=(2,)), _request(quarantined_ids=(unreadable,)))
        assert damaged.sample_ids.tolist() == quarantined.sample_ids.tolist()
        assert np.array_equal(damaged.global_views.pixels, quarantined.global_views.pixels)


def test_request_that_searches_reports_what_it_found_and_decodes_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder has its bug in child processes only, so both batches can be rendered here."""
    monkeypatch.syspath_prepend(DYING_JPEG_DECODER)
    images = [encode(np.full((20, 24, 3), 5 * i, np.uint8), "JPEG") + b"poison" * (i in (3, 6)) for i in range(40)]
    context = dataclasses.replace(_context(), source=ListSource(images))
    expected = render_batch(context, _request(quarantined_ids=(3, 6)))
    search = dataclasses.replace(_request(), search_crashing=True)
    whole, (draft, _) = render_batch(context, search), decode_batch(context, search)
    assert whole.crashing_ids == draft.crashing_ids == (3, 6)
    assert whole.sample_ids.tolist() == draft.sample_ids.tolist() == expected.sample_ids.tolist()
    assert np.array_equal(whole.global_views.pixels, expected.global_views.pixels)
    assert expected.crashing_ids == ()
