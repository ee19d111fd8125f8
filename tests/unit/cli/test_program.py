"""`hvp-ray`: its commands, their help, the options people change most, completion in a shell, and a reader that leaves."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvp_ray import api
from hvp_ray.cli.command_line import COMMON_OPTIONS, RunOptions, describe_common_options, parse_run
from hvp_ray.cli.pretrain import Display
from hvp_ray.cli.program import COMMANDS, SHELLS, describe_commands
from hvp_ray.config import config_to_dict, flatten, with_settings
from hvp_ray.errors import ConfigError
from hvp_ray.recipes import RECIPES, get_recipe
from hvp_ray.runs.progress import Progress

ROOT = Path(__file__).parents[3]
HVP_RAY = [sys.executable, "-c", "from hvp_ray.cli.program import main; main()"]


def run(*words: str, status: int = 0) -> str:
    result = subprocess.run([*HVP_RAY, *words], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == status, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = importlib.import_module(f"hvp_ray.cli.{name}")
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and text.startswith(f"usage: hvp-ray {name} ")
    if issubclass(program.Options, RunOptions):
        assert text.index("Recipes") < text.index("Changed most") < text.index("run options")
        assert all(recipe in text for recipe in RECIPES)


def test_each_program_file_is_the_command_of_its_name() -> None:
    for path in (ROOT / "pipelines").glob("*.py"):
        name = {"analyse_selection": "analyse"}.get(path.stem, path.stem)
        assert name == "__init__" or f'run_command("{name}", sys.argv[1:])' in path.read_text()


def test_help_names_every_command_and_a_wrong_one_has_a_hint() -> None:
    assert run() == run("--help") == f"{describe_commands()}\n"
    assert all(f"  {name}" in describe_commands() for name in COMMANDS)
    assert "has no command 'pretain'; did you mean pretrain?" in run("pretain", status=2)


def test_options_that_people_change_most_are_settings_with_their_values() -> None:
    config = get_recipe("dino-digits")
    values = flatten(config_to_dict(config))
    assert set(COMMON_OPTIONS) <= set(values) and len(COMMON_OPTIONS) == 10
    assert f"({config.training.images_per_step})" in describe_common_options(config)


def test_words_of_python_may_be_lower_case_but_the_tracking_uri_none_stays() -> None:
    config = parse_run(
        ["simsiam-digits", "--selection.score_always", "true", "--tracking.uri", "none", "--data.num_images", "none"],
        program="test",
        description="",
    )
    assert config.selection.score_always and config.tracking.uri == "none" and config.data.num_images is None


def test_ray_is_told_how_to_authenticate_before_a_recipe_that_adapts_itself_imports_it(tmp_path: Path) -> None:
    program = """
import builtins, os, sys
real_import, seen = builtins.__import__, []

def watch(name, *arguments, **options):
    if name.split(".")[0] == "ray" and not seen:
        seen.append(os.environ.get("RAY_AUTH_MODE"))
    return real_import(name, *arguments, **options)

builtins.__import__ = watch
from hvp_ray.cli.command_line import parse_run
parse_run(["simsiam-own", "--data.source", "digits", "--cluster.device", "cpu"], program="test", description="")
assert "ray" in sys.modules
print(seen)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"HOME": str(tmp_path)},
    )
    assert result.stdout.splitlines()[-1] == "['token']", result.stderr


def test_name_of_a_run_without_a_recipe_takes_the_settings_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = with_settings(
        get_recipe("dino-digits"), {"run.name": "one", "run.output": str(tmp_path), "training.epochs": 7}
    )
    (tmp_path / "one").mkdir()
    recorded = with_settings(
        begun, {"run.name": None, "run.output": "/gone", "run.resume": False, "run.accept_versions": True}
    )  # its name was drawn
    (tmp_path / "one" / "config.json").write_text(json.dumps({"config": config_to_dict(recorded)}))
    words = ["--run.name", "one", "--run.output", str(tmp_path)]
    assert parse_run(words, program="test", description="") == begun
    assert "dino-digits: the settings are those in config.json of the run 'one'" in capsys.readouterr().out
    prototypes = parse_run([*words, "--method.num_prototypes", "512"], program="test", description="")
    assert prototypes == with_settings(begun, {"method.num_prototypes": 512})
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "copy")
    copied = parse_run(["--run.name=copy", f"--run.output={tmp_path / 'elsewhere'}"], program="test", description="")
    assert copied == with_settings(
        begun, {"run.name": "copy", "run.output": tmp_path / "elsewhere", "run.resume": True}
    )
    accepting = parse_run([*words, "--run.accept_versions", "true"], program="test", description="")
    assert accepting == with_settings(begun, {"run.accept_versions": True})
    with pytest.raises(ConfigError, match="arm all-pairs is not allowed: the run one exists and keeps its settings"):
        parse_run([*words, "--arm", "all-pairs"], program="test", description="")
    more = parse_run([*words, "--cluster.num_trainers", "2"], program="test", description="")
    assert more == with_settings(begun, {"cluster.num_trainers": 2})
    assert parse_run(["simsiam-digits", *words], program="test", description="").recipe == "simsiam-digits"
    capsys.readouterr()
    assert parse_run(["--run.name", "two", *words[2:]], program="test", description="").recipe == "simsiam-digits"
    assert f"{tmp_path} has no run 'two'; a new one starts, with the recipe simsiam-digits" in capsys.readouterr().out
    named = {"run.name": "one", "run.output": tmp_path}
    assert api._configure(None, named, {"method.num_prototypes": 512}) == (prototypes, True)


def test_continued_run_says_where_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    for first_step, steps_done in [(0, 1), (0, 40), (30, 31), (30, 60)]:
        display.show_progress(
            Progress(
                first_step=first_step,
                steps_done=steps_done,
                num_steps=100,
                epoch=1.0,
                loss=0.5,
                images_per_second=9.0,
                data_wait_fraction=0.0,
            )
        )
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "continued" in line] == ["continued from the checkpoint of step 30"]


def test_recipe_is_the_first_argument() -> None:
    with pytest.raises(ConfigError, match="the recipe 'dino-digits' must be the first argument"):
        parse_run(["--training.epochs", "3", "dino-digits"], program="test", description="")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(shell: str) -> None:
    text = run("completion", shell)
    assert all(word in text for word in (*COMMANDS, "training.epochs", "shard_mib"))


def test_bash_completes_a_command_and_an_option(tmp_path: Path) -> None:
    script = tmp_path / "completion.sh"
    script.write_text(run("completion", "bash"))
    program = """
    source {script}
    complete_words() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _tyro_hvp_ray; echo "${{COMPREPLY[@]}}"; }}
    complete_words hvp-ray pre
    complete_words hvp-ray pack --shard
    """
    lines = subprocess.run(
        ["bash", "-c", program.format(script=script)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines[0].split() == ["pretrain"]
    assert lines[1].split() == ["--shard_mib"]


def test_reader_that_leaves_is_no_error() -> None:
    words = " ".join(f"'{word}'" for word in [*HVP_RAY, "pretrain", "--help"])
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | head -1"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.startswith("usage: hvp-ray pretrain") and result.stderr == ""
