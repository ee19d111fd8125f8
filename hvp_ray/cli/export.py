"""Write the encoder of a run for other programs: timm, torchvision, transformers or ONNX.

hvp-ray export RUN --to timm|torchvision|transformers|onnx [--output FOLDER] [--license NAME] [--push hf://OWNER/NAME]

The folder holds the weights and a model card, README.md, with code that loads them. Features of the written encoder are
compared with those of the run on a few images; nothing is written if they differ.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hvp_ray.cli.command_line import exit_status, find_run, keep_results, say
from hvp_ray.cli.evaluate import read_config
from hvp_ray.errors import CheckpointError
from hvp_ray.export.card import UNKNOWN_LICENCE
from hvp_ray.export.export_run import export_run
from hvp_ray.export.formats import FORMATS
from hvp_ray.export.hub import push, repository_of
from hvp_ray.local_cache import BACKBONE


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the options. Unknown ones end the program with a usage line."""
    parser = argparse.ArgumentParser(
        prog="hvp-ray export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder or URI of a finished run, or its name under runs/")
    add("--to", required=True, choices=list(FORMATS),
        help="; ".join(f"{name}: {format.networks}" for name, format in FORMATS.items()))  # fmt: skip
    add("--output", type=Path, metavar="FOLDER", help="a new folder; default: RUN/export/FORMAT, which is replaced")
    add("--license", default=UNKNOWN_LICENCE, metavar="NAME",
        help="licence of the weights, for the model card: apache-2.0, cc-by-nc-4.0, ...; default: unknown")  # fmt: skip
    add("--show-images", action="store_true",
        help="Vision Transformers: put 8 images of the run on the card, with attention and patch features")  # fmt: skip
    add("--push", metavar="hf://OWNER/NAME",
        help="also upload the folder to the Hugging Face hub; a new repository is private")  # fmt: skip
    return parser.parse_args(arguments)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the summary of a run.

    Raises:
        CheckpointError: summary.json is damaged.
    """
    path = run_dir / "summary.json"
    try:
        summary = json.loads(path.read_text())
        if not isinstance(summary, dict):
            raise TypeError("no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as the summary of a run: {error!r}") from error
    return summary


def export(options: argparse.Namespace) -> None:
    """Export; print what was written.

    Raises:
        HvpRayError: the message tells the user what to do.
    """
    repository = None if options.push is None else repository_of(options.push)
    run_dir = find_run(options.run, needs=("config.json", BACKBONE, "summary.json"))
    config = read_config(run_dir)
    torch.set_num_threads(config.training.torch_threads)
    folder = run_dir / "export" / options.to if options.output is None else options.output.expanduser().absolute()
    check = export_run(
        run_dir,
        config,
        read_summary(run_dir),
        to=options.to,
        folder=folder,
        replace=options.output is None,
        licence=options.license,
        repository=repository,
        show_images=options.show_images,
    )
    say(f"encoder  {run_dir / BACKBONE}")
    say(f"checked  {check}")
    say(f"written  {folder}")
    files = sorted(path for path in folder.iterdir())
    say("\n".join(f"         {path.name}" for path in files))
    if options.license == UNKNOWN_LICENCE:
        say("licence  unknown; --license NAME puts that of the weights on the model card")
    keep_results(options.run, run_dir, files)
    if repository is not None:
        say(f"pushed   {push(folder, repository)} (private if it is new)")


def main(arguments: list[str]) -> int:
    """Run; return the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: export(options))
