"""How a program begins and ends: no arguments; an error of ours is one sentence, Ctrl-C differs, others have tracebacks."""

import pytest

from hvp_ray.cli.command_line import exit_status, parse_run
from hvp_ray.comparison.arms import get_arm
from hvp_ray.errors import ConfigError
from hvp_ray.recipes import DEFAULT_RECIPE


def _raise(error: BaseException) -> None:
    raise error


def test_work_that_succeeds_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_error_is_a_sentence_with_its_notes(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("run.seed=-1 is not allowed")
    error.add_note("rank 0 of 2")
    assert exit_status(lambda: _raise(error)) == 1
    assert capsys.readouterr().err == "error: run.seed=-1 is not allowed\n(rank 0 of 2)\n"


def test_interrupt_has_its_own_status_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: _raise(KeyboardInterrupt()), stopped="stopped; start again") == 130
    assert capsys.readouterr().err == "stopped; start again\n"


def test_error_of_the_program_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        exit_status(lambda: _raise(RuntimeError("a bug")))


def test_no_arguments_are_the_default_recipe() -> None:
    assert parse_run([], program="test", description="").recipe == DEFAULT_RECIPE


@pytest.mark.parametrize("arm", ["vanilla", "asym-aug", "all-pairs:weighting=softmax,start_fraction=0.5"])
def test_run_of_an_arm_is_that_of_the_comparison(arm: str) -> None:
    words = ["simclr-digits", "--training.epochs", "3"]
    expected = get_arm(arm).configure(parse_run(words, program="test", description=""))
    assert parse_run([*words, "--arm", arm], program="test", description="") == expected
    assert expected != parse_run(words, program="test", description="")


def test_arms_that_are_no_single_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="vanilla-long.*set training.epochs"):
        parse_run(["simclr-digits", "--arm", "vanilla-long"], program="test", description="")
    with pytest.raises(ConfigError, match="did you mean 'asym-aug'"):
        parse_run(["simclr-digits", "--arm", "asymaug"], program="test", description="")
    with pytest.raises(ConfigError, match="FastSiam is a form of SimSiam"):
        parse_run(["simclr-digits", "--arm", "fast-siam"], program="test", description="")
