"""The page of a run: one file with every figure inside, commands that its programs accept, and both colour schemes."""

import asyncio
import base64
import dataclasses
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hvp_ray.cli.command_line import parse_run
from hvp_ray.config import RunConfig
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.runs.neighbours import find_neighbours
from hvp_ray.runs.page import next_commands
from tests.end_to_end.browser import CHROMIUM, Browser
from tests.helpers import tiny_config


class _Page(HTMLParser):
    """Tags, images and text of a page; every tag but a void one must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[bytes] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(path.read_text())
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for name, value in attrs if name in ("href", "src") and value is not None]
        if tag == "img":
            source = values["src"]
            assert source is not None and values["alt"]
            self.images.append(base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tracking = {"num_figure_images": 2, "knn_every_epochs": 1}
    summary = pretrain_in_process(tiny_config(str(folder), run={"name": "one"}, tracking=tracking))
    assert summary is not None and summary["problems"] == []
    return folder / "one"


def test_page_has_every_figure_and_needs_no_other_file(run: Path) -> None:
    page = _Page(run / "report.html")
    figures = {path.name: path.read_bytes() for path in (run / "figures").glob("*.png")}
    assert set(figures) == {
        *("candidate_views.png", "overlap.png", "loss.png"),
        *("collapse.png", "knn.png", "neighbours.png"),
    }
    assert sorted(page.images) == sorted(figures.values())
    assert all(link.startswith("data:") for link in page.links)
    summary = json.loads((run / "summary.json").read_text())
    assert f"k-NN accuracy {100 * summary['knn_top1']:.2f} %" in page.words
    for wanted in ("one", "training.images_per_step = 16", "What to do next", str(run)):
        assert wanted in page.words


def test_page_that_cannot_be_written_is_a_problem_and_not_a_failure(tmp_path: Path) -> None:
    (tmp_path / "one" / "report.html").mkdir(parents=True)
    config = tiny_config(str(tmp_path), run={"name": "one"}, tracking={"num_figure_images": 2})
    summary = pretrain_in_process(config)
    assert summary is not None and summary["knn_top1"] is not None
    (problem,) = summary["problems"]
    assert problem.startswith("the page failed: ")


def _of(command: str) -> RunConfig:
    program, _, *arguments = shlex.split(command.replace("\\\n", ""))
    assert program == "hvp-ray"
    return parse_run(arguments, program="hvp-ray", description="")


def test_commands_give_the_run_again_but_for_what_they_change(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path / "my runs"), selection={"num_views": 3, "rule": "min_iou"}, run={"seed": 3})
    commands = next_commands(config, str(tmp_path / "my runs" / "it's"))
    again = _of(commands["Train on from this encoder, with a new schedule"])
    assert again.training.initial_weights == str(tmp_path / "my runs" / "it's")
    training = dataclasses.replace(again.training, initial_weights=None)
    assert dataclasses.replace(again, training=training, run=config.run) == config
    compared = _of(commands["Compare hard with random views on paired seeds"])
    selection = dataclasses.replace(compared.selection, rule="min_iou")
    assert dataclasses.replace(compared, selection=selection, run=config.run) == config


def test_neighbours_are_the_largest_cosines_of_a_slow_search(generator: np.random.Generator) -> None:
    config = tiny_config("unused")
    queries, bank = (generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8) for count in (3, 12))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    names = [f"{index}.png" for index in range(12)]
    found = find_neighbours("", encoder, queries, bank, names, config, torch.device("cpu"))
    mean, std = np.array(config.views.mean), np.array(config.views.std)
    weight, bias = (tensor.detach().numpy() for tensor in encoder[1].parameters())

    def feature(image: np.ndarray) -> np.ndarray:
        pixels = ((image / 255 - mean) / std).transpose(2, 0, 1).ravel()
        value: np.ndarray = weight @ pixels + bias
        return value / np.linalg.norm(value)

    for query, images, of_images, similarities in zip(
        queries, found.images, found.names, found.similarities, strict=True
    ):
        cosines = [float(feature(query) @ feature(image)) for image in bank]
        order = np.argsort(cosines)[::-1][:5]
        assert (images == bank[order]).all() and of_images == [names[index] for index in order]
        np.testing.assert_allclose(similarities, np.array(cosines)[order], atol=1e-5)


@pytest.mark.parametrize("num_images", [2, 3])
def test_few_images_without_labels_have_neighbours_too(
    tmp_path: Path, num_images: int, generator: np.random.Generator
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(num_images):
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index} a$b_{{$.png")  # no formula
    config = tiny_config(
        str(tmp_path),
        run={"name": "one"},
        data={"source": str(tmp_path / "images"), "num_images": None},
        training={"images_per_step": 2, "epochs": 1},
        tracking={"num_figure_images": 1},
    )
    summary = pretrain_in_process(config)
    assert summary is not None and summary["problems"] == []
    assert (tmp_path / "one" / "figures" / "neighbours.png").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_page_opens_in_a_browser_light_and_dark(run: Path) -> None:
    async def look() -> list[str]:
        colors = []
        async with Browser(width=1200) as page:
            await page.open((run / "report.html").as_uri())
            await page.wait_until("document.querySelectorAll('figure').length === 6")
            await page.wait_until("[...document.images].every(image => image.naturalWidth > 100)")
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            for scheme in ("light", "dark"):
                await page.prefer(scheme)
                colors.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        return colors

    assert asyncio.run(look()) == ["rgb(255, 255, 255)", "rgb(24, 24, 24)"]


def test_run_on_a_bucket_has_page_and_event_files_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    tracking = {"num_figure_images": 2, "loggers": ("tensorboard",)}
    config = tiny_config(bucket.as_uri(), run={"name": "one"}, training={"num_steps": 8}, tracking=tracking)
    assert pretrain_in_process(config, report_progress=lambda _progress: True) is None
    assert not (bucket / "one" / "tensorboard").exists()
    assert pretrain_in_process(config) is not None
    page = _Page(bucket / "one" / "report.html")
    assert f"--checkpoint {bucket.as_uri()}/one" in page.words
    assert len(page.images) == len(list((bucket / "one" / "figures").iterdir())) == 5
    (events,) = (bucket / "one" / "tensorboard").iterdir()
    assert b"summary/knn_top1" in events.read_bytes()
