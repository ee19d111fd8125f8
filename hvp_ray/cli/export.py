"""Write the encoder of a run for other programs: timm, torchvision, transformers or ONNX.

hvp-ray export RUN --to timm|torchvision|transformers|onnx [--output FOLDER] [--license NAME] [--push hf://OWNER/NAME]

The folder holds the weights and a model card, README.md, with code that loads them. Features of the written encoder are
compared with those of the run on a few images; nothing is written if they differ.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from hvp_ray.cli.command_line import exit_status, parse_options, say
from hvp_ray.config.checks import Checked
from hvp_ray.launch.environment import prepare_home
from hvp_ray.local_cache import BACKBONE
from hvp_ray.runs.find import find_run, keep_results, read_config, read_summary


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of an export."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder or URI of a finished run, or its name under runs/."""

    to: Literal["timm", "torchvision", "transformers", "onnx"]
    """Format: timm (every encoder), torchvision (ResNets of the usual widths), transformers (Vision Transformers, as
    ViTModel) or onnx (every encoder, for images of one size)."""

    output: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A new folder. None: RUN/export/FORMAT, which is replaced."""

    license: str = "unknown"
    """Licence of the weights, for the model card: apache-2.0, cc-by-nc-4.0, ..."""

    show_images: bool = False
    """Put 8 images of the run's data on the model card, with attention and patch features of a Vision Transformer."""

    push: Annotated[str | None, tyro.conf.arg(metavar="hf://OWNER/NAME")] = None
    """Also upload the folder to the Hugging Face hub. A new repository is private."""


def export(options: Options) -> None:
    """Export; print what was written.

    Raises:
        HvpRayError: the message tells the user what to do.
    """
    from hvp_ray.export.export_run import export_run
    from hvp_ray.export.hub import push, repository_of

    prepare_home()
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
    files = sorted(folder.iterdir())
    say(f"encoder  {run_dir / BACKBONE}")
    say(f"checked  {check}")
    say(f"written  {folder}: {', '.join(path.name for path in files)}")
    if options.license == "unknown":
        say("licence  unknown; --license NAME puts that of the weights on the model card")
    keep_results(options.run, run_dir, files)
    if repository is not None:
        say(f"pushed   {push(folder, repository)} (private if it is new)")


def main(arguments: list[str]) -> int:
    """Export; return the exit status."""
    return exit_status(
        lambda: export(parse_options(Options, arguments, program="hvp-ray export", description=__doc__ or ""))
    )
