"""`hvp-ray export`: the folder and its model card, what is refused, and the upload to a hub."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hvp_ray.cli.export import main
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.export.card import public_name
from hvp_ray.export.export_run import export_run
from hvp_ray.export.formats import FORMATS
from hvp_ray.export.hub import repository_of
from hvp_ray.export.trained_encoder import TrainedEncoder
from hvp_ray.runs.find import read_config
from tests.unit.export.model_hub import REPOSITORY, TOKEN, ModelHub
from tests.unit.export.runs import NETWORKS, make_run


def test_card_has_licence_data_recipe_metrics_and_seed(tmp_path: Path) -> None:
    run_dir, _ = make_run(tmp_path, NETWORKS["vit"])
    assert (
        main(
            [str(run_dir), "--to", "timm", "--license", "cc-by-4.0", "--output", str(tmp_path / "out"), "--show-images"]
        )
        == 0
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "timm")
    assert "simsiam" in card.data.tags
    for text in (
        "# my-run\n",
        "| recipe | simsiam-digits |",
        "| data | 3 images of photographs |",
        "| length | 2 epochs, 7 steps of 16 images |",
        "| seed | 0 |",
        "An image encoder that was pretrained without labels: ",
        "| started from | random weights |",
        "| knn_top1 | 0.8765 | k-NN accuracy of the final encoder, with the labels of all `num_knn_training_images`. |",
        "| num_knn_training_images | 5,000 |",
        "| loss_last | -0.2500 |",
        "![Patch features and attention of the last block](attention.png)",
        "Licence of the weights: cc-by-4.0.",
    ):
        assert text in card.content, text
    assert "other_iou_mean" not in card.content
    assert str(tmp_path) not in card.content
    assert (tmp_path / "out" / "attention.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("section", "values", "start"),
    [
        ("training", {"initial_weights": "/home/me/resnet18_a1.safetensors"}, "the weights resnet18_a1.safetensors"),
        ("training", {"initial_run": "/home/me/runs/earlier"}, "the run earlier"),
        ("method", {"backbone": {"pretrained": True}}, "timm's weights of resnet10"),
    ],
)
def test_card_says_what_the_weights_started_from(
    tmp_path: Path, section: str, values: dict[str, Any], start: str
) -> None:
    run_dir, _ = make_run(tmp_path, NETWORKS["cifar-narrow"])
    path = run_dir / "config.json"
    content = json.loads(path.read_text())
    of_section = content["config"][section]
    for name, value in values.items():
        of_section[name] = of_section[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    assert main([str(run_dir), "--to", "timm"]) == 0
    card = (run_dir / "export" / "timm" / "README.md").read_text()
    assert f"An image encoder that was trained further without labels, from {start}: " in card
    assert f"| started from | {start} |" in card and "/home/me" not in card


def test_licence_is_unknown_and_no_image_is_shown_unless_asked(tmp_path: Path) -> None:
    run_dir, _ = make_run(tmp_path, NETWORKS["vit"])
    assert main([str(run_dir), "--to", "timm"]) == 0
    folder = run_dir / "export" / "timm"
    assert ModelCard.load(folder / "README.md").data.license == "unknown"
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "new", *folder.iterdir())}
    assert len(modes) == 1


def test_images_that_cannot_be_shown_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vit").mkdir()
    for place, network, why in (
        (tmp_path, "cifar-narrow", "resnet10 has no class token"),
        (tmp_path / "vit", "vit", "there would be 8 random images"),
    ):
        run_dir, _ = make_run(place, NETWORKS[network])
        shutil.rmtree(place / "photographs")
        assert main([str(run_dir), "--to", "timm", "--show-images"]) == 1
        assert f"--show-images is not allowed: {why}" in capsys.readouterr().err


def test_images_are_random_if_the_data_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = make_run(tmp_path, NETWORKS["vit"])
    shutil.rmtree(tmp_path / "photographs")
    assert main([str(run_dir), "--to", "timm"]) == 0
    assert "On 8 random images, because the run's data cannot be read (data.source=" in capsys.readouterr().out


def test_default_folder_is_replaced_and_another_must_be_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = make_run(tmp_path, NETWORKS["cifar-narrow"])
    stale = run_dir / "export" / "timm" / "stale.bin"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert main([str(run_dir), "--to", "timm"]) == 0
    assert not stale.exists()
    mine = tmp_path / "mine" / "thesis.tex"
    mine.parent.mkdir()
    mine.touch()
    assert main([str(run_dir), "--to", "timm", "--output", str(mine.parent)]) == 1
    assert "is not empty; give another folder" in capsys.readouterr().err
    assert [path.name for path in mine.parent.iterdir()] == ["thesis.tex"]
    assert main([str(run_dir), "--to", "timm", "--output", str(mine)]) == 1
    assert "cannot be written: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_nothing_is_written_if_the_features_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def write_damaged(encoder: TrainedEncoder, folder: Path) -> None:
        FORMATS["timm"].write(encoder, folder)
        weights = load_file(folder / "model.safetensors")
        weights["conv1.weight"][0, 0, 0, 0] *= value
        save_file(weights, folder / "model.safetensors")

    monkeypatch.setitem(FORMATS, "damaged", dataclasses.replace(FORMATS["timm"], write=write_damaged))
    run_dir, _ = make_run(tmp_path, NETWORKS["cifar-narrow"])
    with pytest.raises(CheckpointError, match="nothing was written: on 3 images"):
        export_run(
            run_dir, read_config(run_dir), {}, to="damaged", folder=tmp_path / "out" / "damaged", licence="unknown"
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("to", "module"), [("transformers", "transformers"), ("onnx", "onnxruntime")])
def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str, module: str
) -> None:
    run_dir, _ = make_run(tmp_path, NETWORKS["vit"])
    monkeypatch.setitem(sys.modules, module, None)
    assert main([str(run_dir), "--to", to]) == 1
    error = capsys.readouterr().err
    assert f"--to {to} needs the package {module}" in error
    assert "pip install 'hvp-ray[export]'" in error


def test_run_on_a_bucket_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, encoder = make_run(tmp_path, NETWORKS["cifar-narrow"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main([run_dir.as_uri(), "--to", "timm"]) == 0
    written = load_file(run_dir / "export" / "timm" / "model.safetensors")
    assert torch.equal(written["conv1.weight"], encoder.conv1.weight)
    assert (run_dir / "export" / "timm" / "README.md").exists()


def test_run_that_has_not_ended_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = make_run(tmp_path, NETWORKS["cifar-narrow"])
    (run_dir / "summary.json").write_text("[]")
    assert main([str(run_dir), "--to", "timm"]) == 1
    assert "summary.json cannot be read as the summary" in capsys.readouterr().err
    (run_dir / "summary.json").unlink()
    assert main([str(run_dir), "--to", "timm"]) == 1
    assert "has no summary.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/someone/private/cats", "cats"),
        ("digits", "digits"),
        ("hf://datasets/owner/name@main/train", "hf://datasets/owner/name@main/train"),
        ("s3://bucket/prefix?endpoint_override=10.0.0.7:9000", "s3://bucket/prefix"),
    ],
)
def test_card_names_no_private_place(source: str, name: str) -> None:
    assert public_name(source) == name


@pytest.mark.parametrize("uri", ["owner/name", "hf://name", "hf://datasets/owner/name", "hf://owner/na me", "s3://a/b"])
def test_only_repositories_of_models_are_pushed_to(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert repository_of("hf://owner/name") == "owner/name"
    with pytest.raises(ConfigError, match="expected hf://OWNER/NAME"):
        repository_of(uri)


def test_folder_is_pushed_to_a_private_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, encoder = make_run(tmp_path, NETWORKS["cifar-narrow"])
    hub = ModelHub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    command = [str(run_dir), "--to", "timm", "--push", f"hf://{REPOSITORY}"]
    try:
        assert main(command) == 1
        assert "needs a token of the Hugging Face hub" in capsys.readouterr().err
        assert not (run_dir / "export").exists()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert main(command) == 0
        assert f"pushed   {hub.endpoint}/{REPOSITORY}" in capsys.readouterr().out
        assert hub.created == [{"name": "encoder", "organization": "owner", "visibility": "private"}]
        folder = run_dir / "export" / "timm"
        assert hub.committed == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert f'snapshot_download("{REPOSITORY}")' in hub.committed["README.md"].decode()
        (tmp_path / "model.safetensors").write_bytes(hub.committed["model.safetensors"])
        assert torch.equal(load_file(tmp_path / "model.safetensors")["conv1.weight"], encoder.conv1.weight)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert main(command) == 1
        error = capsys.readouterr().err
        assert f"--push hf://{REPOSITORY} failed" in error
        assert f"hf upload {REPOSITORY}" in error
        assert "hf_wrong" not in error
    finally:
        hub.close()
