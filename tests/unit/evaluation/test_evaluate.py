"""evaluate.py recognises the images that a run was trained on. `tests/end_to_end/test_evaluate.py` runs it."""

import json
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.cli.evaluate import Evaluation, main, parse_arguments, read_trained_on
from hvp_ray.config import RunConfig
from hvp_ray.data.source import open_source
from hvp_ray.methods.backbones import build_backbone, export_backbone
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.prepare import prepare_run
from tests.helpers import encode, photograph_like, tiny_config
from tests.unit.data.made import write_folder
from tests.unit.export.runs import NETWORKS, make_run


def _write(folder: Path, generator: np.random.Generator) -> Path:
    """Uncompressed images: all folders have files of equal names and sizes."""
    return write_folder(folder, [encode(photograph_like(generator, 12, 12), "BMP") for _ in range(40)])


@pytest.fixture
def config(tmp_path: Path, generator: np.random.Generator) -> RunConfig:
    data = {"source": str(_write(tmp_path / "images", generator)), "num_images": None}
    return tiny_config(str(tmp_path), run={"name": "r"}, data=data)


def test_images_of_the_run_are_known_by_more_than_names_and_sizes(
    config: RunConfig, tmp_path: Path, generator: np.random.Generator
) -> None:
    prepare_run(config, resolve_inline(config.cluster))
    trained_on = read_trained_on(tmp_path / "r", config)
    own, other = (
        open_source(str(folder), config.data) for folder in (tmp_path / "images", _write(tmp_path / "o", generator))
    )
    assert own.fingerprint() == other.fingerprint()
    assert trained_on.are(own)
    assert not trained_on.are(other)


def test_without_the_images_of_the_run_the_fingerprint_decides(config: RunConfig, tmp_path: Path) -> None:
    prepare_run(config, resolve_inline(config.cluster))
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    assert read_trained_on(tmp_path / "r", config).are(open_source(str(moved), config.data))


@pytest.mark.parametrize("name", ["data fingerprint", "something else"])
def test_run_of_an_earlier_version_is_evaluated(config: RunConfig, tmp_path: Path, name: str) -> None:
    prepare_run(config, resolve_inline(config.cluster))
    path = tmp_path / "r" / "config.json"
    record = json.loads(path.read_text())
    record["identity"][name] = record["identity"].pop("training data")
    path.write_text(json.dumps(record))
    backbone = config.method.backbone
    export_backbone(build_backbone(backbone), backbone, tmp_path / "r" / "backbone.safetensors")
    evaluation = Evaluation(tmp_path / "r", config, parse_arguments(["--checkpoint", "r"]))
    is_known = name == "data fingerprint"
    assert evaluation.num_trained_on == (0 if is_known else None)
    assert any("did not record what it was trained on" in remark for remark in evaluation.remarks) is not is_known


@pytest.mark.parametrize(("network", "has_maps"), [("vit", True), ("cifar-narrow", False)])
def test_evaluation_draws_the_attention_of_a_vision_transformer(tmp_path: Path, network: str, has_maps: bool) -> None:
    run_dir, _ = make_run(tmp_path, NETWORKS[network])
    assert main(["--checkpoint", str(run_dir), "--num-workers", "1", "--json", str(tmp_path / "out" / "e.json")]) == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"e.json"} | ({"e-attention.png"} if has_maps else set())
