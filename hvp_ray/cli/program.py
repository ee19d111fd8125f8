"""`hvp-ray`: choose the subcommand and run it."""

import difflib
import importlib
import sys
from typing import NoReturn

import hvp_ray
from hvp_ray.cli.command_line import leave, say

COMMANDS = {
    "pretrain": "pretrain an encoder, on this machine or on a Ray cluster",
    "compare": "train hard and random views on paired seeds, and write a report",
    "evaluate": "evaluate the encoder of a run by k-NN, probes, few labels or fine-tuning",
    "describe": "print what a run needs, without starting it",
    "pack": "pack images into a few large, checked files",
    "analyse": "report which pairs a run chose, and what made them hard",
}
"""Subcommand -> what it does. `hvp_ray.cli.NAME` has a function `main(arguments)` that returns the exit status."""


def run_command(name: str, arguments: list[str]) -> NoReturn:
    """Run a subcommand and end the process with its exit status."""
    leave(importlib.import_module(f"hvp_ray.cli.{name}").main(arguments))


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
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: hvp-ray has no command {name!r}{hint}\n\n{describe_commands()}", file=sys.stderr)
        sys.exit(2)
    run_command(name, arguments)
