"""Images with more than 8 bits a channel stop a run before it starts, or are trained on as the levels that they become."""

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.cli.command_line import parse_run
from hvp_ray.config import DataConfig, RunConfig, config_from_dict, config_to_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import ConfigError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.records import BatchRequest, ViewBatch
from hvp_ray.runs.intensity_check import check_intensities
from hvp_ray.stream.reading import read_sample
from hvp_ray.stream.render_batch import decode_batch, find_crashing_ids, finish_batch, open_render_context, render_batch
from hvp_ray.views.render_cpu import CpuRenderer
from tests.helpers import encode, tiny_config
from tests.unit.data import made_intensities as made
from tests.unit.data.made import write_folder

HEIGHT, WIDTH = 12, 15


def _check(folder: Path, **options: object) -> str:
    data = DataConfig(source=str(folder), **options)
    return "".join(check_intensities(data, open_dataset(data)))


def _values(generator: np.random.Generator, low: float, high: float, kind: str) -> np.ndarray:
    """Values that reach both ends."""
    values = generator.uniform(low, high, (HEIGHT, WIDTH)).astype(kind)
    values[0, 0], values[-1, -1] = low, high
    return values


@pytest.mark.parametrize(
    ("low", "high", "kind", "advice"),
    [
        (0, 4000, "u2", "0 4095"),
        (0, 1023, "u2", "0 1023"),
        (3, 200, "u2", "0 255"),
        (0, 1, "u2", "0 1"),
        (0, 65_535, "u2", "0 65535"),
        (-1024, 3071, "i2", "-1024 3071"),
        (0, 255, "i4", "0 255"),
        (0, 2**32 - 1, "u4", "0 4294967295"),
        (0, 1, "f4", "0 1"),
        (0.25, 0.5, "f4", "0 1"),
        (-2.5, 7.5, "f4", "-2.5 7.5"),
    ],
)
def test_run_is_refused_with_what_the_images_hold_and_a_range_that_is_taken(
    tmp_path: Path, generator: np.random.Generator, low: float, high: float, kind: str, advice: str
) -> None:
    images = [made.tiff_of(_values(generator, low, high, kind)) for _ in range(6)]
    write_folder(tmp_path, images)
    with pytest.raises(ConfigError, match=r"data.source=.*: (\d) of \1 sampled images hold") as refusal:
        _check(tmp_path)
    assert f"from {low:.10g} to {high:.10g}" in str(refusal.value)
    given = re.search(r"give (--data.intensity_range (\S+ [^\s,]+)),", str(refusal.value))
    assert given is not None
    assert given[2] == advice
    config = parse_run(["simsiam-digits", *given[1].split()], program="x", description="")
    black, white = map(float, advice.split())
    assert config.data.intensity_range == (black, white)
    remark = _check(tmp_path, intensity_range=config.data.intensity_range)
    assert f"{black:.10g} black and {white:.10g} white" in remark
    assert "clips" not in remark


def test_outliers_are_told_apart_by_percentiles(tmp_path: Path, generator: np.random.Generator) -> None:
    values = _values(generator, 100, 300, "u2")
    values[0, :2] = [60_000, 0]
    images = [values, *[_values(generator, 100, 300, "u2") for _ in range(19)]]
    write_folder(tmp_path, [made.png16(image) for image in images])
    with pytest.raises(ConfigError, match=r"from 0 to 60000 \(99.8 % of them from 1\d\d(\.\d+)? to [23]\d\d"):
        _check(tmp_path)
    assert re.search(r"and clips 0\.\d+% of the values", _check(tmp_path, intensity_range=(100.0, 300.0)))


def test_images_of_8_bits_need_nothing_and_a_range_for_them_is_remarked(tmp_path: Path) -> None:
    write_folder(tmp_path, [encode(np.full((9, 9, 3), 20 * i, np.uint8), "JPEG") for i in range(6)])
    assert _check(tmp_path) == ""
    assert "is not used" in _check(tmp_path, intensity_range=(0.0, 4095.0))


def test_images_of_the_test_set_count(tmp_path: Path, generator: np.random.Generator) -> None:
    write_folder(tmp_path / "train", [encode(np.zeros((9, 9, 3), np.uint8))] * 3)
    write_folder(tmp_path / "test", [made.png16(_values(generator, 0, 4095, "u2"))] * 3)
    with pytest.raises(ConfigError, match=r"(\d) of \d sampled images.*--data.intensity_range 0 4095"):
        _check(tmp_path / "train", test_source=str(tmp_path / "test"))


def test_sample_of_large_images_ends_early_is_spread_and_the_same_each_time(tmp_path: Path) -> None:
    write_folder(tmp_path, [bytes([index]) * 1000 for index in range(200)])
    source = open_dataset(DataConfig(source=str(tmp_path), test_fraction=0.0)).source
    ids = np.arange(200)
    taken = [[image[0] for image in read_sample(source, ids, max_bytes=limit)] for limit in (1, 16_000, 16_000, 2**20)]
    assert [len(some) for some in taken] == [8, 16, 16, 64]
    assert taken[1] == taken[2]
    for some in taken:
        assert min(some) < 50 and max(some) >= 150
        assert np.diff(sorted(some)).max() <= 2 * 200 / len(some)


def test_check_holds_a_few_images_at_a_time(tmp_path: Path) -> None:
    write_folder(tmp_path, [encode(np.zeros((9, 9, 3), np.uint8)) + bytes(2**20)] * 64)
    data = DataConfig(source=str(tmp_path), test_fraction=0.0)
    dataset = open_dataset(data)
    tracemalloc.start()
    try:
        assert check_intensities(data, dataset) == []
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of 12-bit images, and of the 8-bit images that these become."""
    root, generator = tmp_path_factory.mktemp("twins"), np.random.default_rng(0)
    deep = [generator.integers(0, 4096, (HEIGHT + i % 3, WIDTH)).astype(np.uint16) for i in range(40)]
    flat = [np.rint(image * (255 / 4095)).astype(np.uint8) for image in deep]
    write_folder(root / "deep", [made.png16(image) for image in deep])
    write_folder(root / "flat", [encode(image) for image in flat])
    return root / "deep", root / "flat"


def _configs(twins: tuple[Path, Path], output: Path, **sections: dict[str, object]) -> list[RunConfig]:
    ranges = ((0.0, 4095.0), None)
    return [
        tiny_config(
            str(output),
            run={"name": folder.name},
            data={"source": str(folder), "num_images": None, "intensity_range": intensity_range},
            **sections,
        )
        for folder, intensity_range in zip(twins, ranges, strict=True)
    ]


def _batches(config: RunConfig) -> dict[str, ViewBatch]:
    """The first batch by every way that renders one."""
    request = BatchRequest(
        step=0,
        epoch=0,
        first_position=0,
        sample_ids=open_dataset(config.data).training_ids[:16].astype(np.int64),
        num_views=3,
    )
    contexts = {name: open_render_context(config_to_dict(config), name) for name in ("cpu", "dali-cpu")}
    finisher = CpuRenderer(config.views, config.data)
    found = {name: render_batch(context, request) for name, context in contexts.items()}
    assert find_crashing_ids(contexts["cpu"], request) == ()
    return found | {"in two halves": finish_batch(finisher, *decode_batch(contexts["cpu"], request))}


def test_every_renderer_shows_12_bits_as_the_8_bits_that_they_become(twins: tuple[Path, Path], tmp_path: Path) -> None:
    deep, flat = map(_batches, _configs(twins, tmp_path))
    for name, batch in deep.items():
        assert np.array_equal(batch.sample_ids, flat[name].sample_ids), name
        assert np.array_equal(batch.global_views.pixels, flat[name].global_views.pixels), name
        assert len(np.unique(batch.global_views.pixels)) > 200


def test_run_on_12_bits_is_the_run_on_the_8_bits_that_they_become(twins: tuple[Path, Path], tmp_path: Path) -> None:
    """Weights, evaluations and figures; and the range is saved with the run."""
    sections = {"tracking": {"num_figure_images": 2, "knn_every_epochs": 1}}
    configs = _configs(twins, tmp_path, **sections)
    deep, flat = map(pretrain_in_process, configs)
    assert deep is not None
    assert flat is not None
    for name in ("weights_digest", "knn_top1", "knn5shot_top1_pixels", "num_unreadable_images"):
        assert deep[name] == flat[name], name
    assert deep["knn_top1"] is not None
    assert deep["run_identity"] != flat["run_identity"]
    pictures = [(tmp_path / folder.name / "figures" / "candidate_views.png").read_bytes() for folder in twins]
    assert pictures[0] == pictures[1]
    saved = config_from_dict(json.loads((tmp_path / "deep" / "config.json").read_text())["config"])
    assert saved.data.intensity_range == (0.0, 4095.0)


def test_run_without_a_range_ends_before_anything_is_written(twins: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), run={"name": "refused"}, data={"source": str(twins[0]), "num_images": None})
    with pytest.raises(ConfigError, match=r"32 of 32 sampled images hold 16-bit unsigned integers.*0 4095"):
        pretrain_in_process(config)
    assert not (tmp_path / "refused").exists()
