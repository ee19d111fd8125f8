"""`hvp-ray`: choose the subcommand and run it."""

import difflib
import functools
import importlib
import operator
import os
import sys
from typing import Annotated, Any, NoReturn

import tyro

import hvp_ray
from hvp_ray.cli.command_line import PARSER_SETTINGS, RunOptions, leave, say
from hvp_ray.recipes import DEFAULT_RECIPE, get_recipe

COMMANDS = {
    "pretrain": "pretrain an encoder, on this machine or on a Ray cluster",
    "compare": "train hard and random views on paired seeds, and write a report",
    "evaluate": "evaluate the encoder of a run by k-NN, probes, few labels or fine-tuning",
    "export": "write the encoder of a run for timm, torchvision, transformers or ONNX",
    "describe": "print what a run needs, without starting it",
    "pack": "pack images into a few large, checked files",
    "analyse": "report which pairs a run chose, and what made them hard",
    "ui": "open MLflow's page on the curves of all runs",
}
"""Subcommand -> what it does. `hvp_ray.cli.NAME` has a dataclass `Options` and a function `main(arguments)` that returns the
exit status."""
SHELLS = ("bash", "zsh")


def run_command(name: str, arguments: list[str]) -> NoReturn:
    """Run a subcommand and end the process with its exit status."""
    try:
        status = importlib.import_module(f"hvp_ray.cli.{name}").main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    leave(status)


def print_completion(shell: str) -> None:
    """Print the script that completes commands and options in a shell."""
    commands: list[Any] = []
    for name, purpose in COMMANDS.items():
        options = importlib.import_module(f"hvp_ray.cli.{name}").Options
        default = options(run=get_recipe(DEFAULT_RECIPE)) if issubclass(options, RunOptions) else tyro.MISSING_NONPROP
        commands.append(Annotated[options, tyro.conf.subcommand(name, default=default, description=purpose)])
    words = ["--tyro-print-completion", shell]
    any_command: Any = functools.reduce(operator.or_, commands)
    tyro.cli(any_command, prog="hvp-ray", args=words, use_underscores=True, config=PARSER_SETTINGS)


def describe_commands() -> str:
    """Return the help of `hvp-ray`."""
    lines = [f"  {name:<12}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hvp-ray COMMAND ...",
            "",
            *lines,
            "",
            "hvp-ray COMMAND --help has the options of each. Begin with: hvp-ray pretrain",
            f"hvp-ray completion {'|'.join(SHELLS)} prints the script that completes commands and options in your shell.",
        ]
    )


def main() -> None:
    """Entry point of the command `hvp-ray`."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        say(describe_commands())
        return
    if name == "--version":
        say(f"hvp-ray {hvp_ray.__version__}")
        return
    if name == "completion" and arguments and arguments[0] in SHELLS:
        print_completion(arguments[0])
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: hvp-ray has no command {name!r}{hint}\n\n{describe_commands()}", file=sys.stderr)
        sys.exit(2)
    run_command(name, arguments)
