"""The package from Python: pretrain, compare, load an encoder, embed images. `import hvp_ray` has these names.

Each call does what the program of its name does, with the same settings, files and bits.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hvp_ray.comparison.arms import refusal_for_existing_run, run_of_arm
from hvp_ray.config import RunConfig, conditions_left_out, with_settings
from hvp_ray.launch.environment import prepare_ray_environment
from hvp_ray.recipes import DEFAULT_RECIPE, get_recipe
from hvp_ray.recipes.own import OWN_RECIPES

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from hvp_ray.evaluation.encoder import AnImage, Encoder


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    path: str
    """Its folder, or the URI of it."""

    @cached_property
    def folder(self) -> Path:
        """Its folder on this machine; of a run on a bucket, a copy."""
        from hvp_ray.runs.find import find_run

        return find_run(self.path, needs=("config.json", "summary.json"), folders=("figures",))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json: steps, speeds, k-NN accuracies."""
        from hvp_ray.runs.find import read_summary

        return read_summary(self.folder)

    @cached_property
    def config(self) -> RunConfig:
        """All settings of the run."""
        from hvp_ray.runs.find import read_config

        return read_config(self.folder)

    @cached_property
    def encoder(self) -> "Encoder":
        """The trained encoder (the teacher's, if there is one)."""
        return load_encoder(self.path)

    @cached_property
    def metrics(self) -> "pd.DataFrame":
        """The curves: a row for each recorded step, a column for each metric."""
        import pandas as pd

        from hvp_ray.runs.find import find_run
        from hvp_ray.tracking.run_log import METRICS, read_records

        records = read_records(find_run(self.path, folders=("log",)), METRICS)
        return pd.DataFrame([{"step": r["step"], "time": r["time"], **r["metrics"]} for r in records])

    @cached_property
    def figures(self) -> "dict[str, Image.Image]":
        """Its figures by name."""
        from PIL import Image

        return {path.stem: Image.open(path) for path in sorted((self.folder / "figures").glob("*.png"))}

    def __repr__(self) -> str:
        accuracy = self.summary.get("knn_top1")
        result = "" if accuracy is None else f", k-NN accuracy {accuracy:.4f}"
        return f"Run({self.path!r}: {self.summary['recipe']}, {self.summary['num_steps']} steps{result})"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison that has ended."""

    path: Path
    """Its folder; of a comparison on a bucket, the copy of its report on this machine."""
    sentence: str
    """The result."""
    report: Path
    """The report, an HTML page without links to other files."""

    @cached_property
    def runs(self) -> "pd.DataFrame":
        """A row for each run: arm, seed, name, steps and accuracies."""
        import pandas as pd

        return pd.DataFrame(json.loads((self.path / "report.json").read_text())["runs"])

    @cached_property
    def figures(self) -> "dict[str, Image.Image]":
        """Its figures by name."""
        from PIL import Image

        return {path.stem: Image.open(path) for path in sorted((self.path / "figures").glob("*.png"))}


def pretrain(
    source: str | Path | None = None,
    *,
    recipe: str | None = None,
    backbone: str | None = None,
    test_source: str | Path | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    arm: str | None = None,
    name: str | None = None,
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    ray: bool = True,
    progress: bool = True,
) -> Run:
    """Pretrain an encoder; return the finished run.

    Args:
        source: images: a folder, Parquet, shards, or a URI. None: those of the recipe.
        recipe: settings to start from. None: those of the existing run `name`, or else `simsiam-digits`.
        backbone: network, a name of timm. None: that of the recipe.
        test_source: labelled images for the evaluation at the end.
        epochs: passes over the images.
        seed: seed of all random numbers.
        arm: change the run as this arm of `compare` does, such as `asym-aug` or `all-pairs`. None: the recipe's views. An
            existing run whose settings are read keeps its arm: leave this out.
        name: name of the run's folder; the name of an existing run continues it, or returns it if it has ended.
        output: folder or URI of all runs. None: `runs/` in the working folder.
        settings: further settings, as path -> value: `{"optimizer.learning_rate_per_256": 0.1}`.
        ray: render in view workers, on the cluster that RAY_ADDRESS names or on a local Ray. False: everything in this
            process, with the same bits; for small runs.
        progress: show a progress bar.

    Raises:
        HvpRayError: the message tells what to do. Everything that was committed stays.
    """
    given = {
        "data.source": source,
        "method.backbone.name": backbone,
        "data.test_source": test_source,
        "training.epochs": epochs,
        "run.seed": seed,
        "run.name": name,
        "run.output": output,
    }
    config, is_recorded = _configure(recipe, given, settings)
    if arm is not None:
        if is_recorded:
            raise refusal_for_existing_run(arm, name)
        config = run_of_arm(arm, config)
    prepare_ray_environment()
    from hvp_ray.files import place_in
    from hvp_ray.runs.location import output_location
    from hvp_ray.runs.record import finished_summary

    if config.run.name is not None and finished_summary(config) is not None:
        return Run(place_in(output_location(config), config.run.name))
    bar = _Bar(shown=progress)
    try:
        if ray:
            from hvp_ray.launch.driver import launch
            from hvp_ray.launch.watch import Watchers

            _, job = launch(config, Watchers(show_progress=bar.show_run, show_message=bar.write))
            return Run(job.location)
        from tqdm.contrib.logging import logging_redirect_tqdm

        from hvp_ray.launch.local import pretrain_in_process

        with logging_redirect_tqdm():
            summary = pretrain_in_process(config, report_progress=bar.report)
        assert summary is not None  # no other process, and nothing asks for a stop
        return Run(place_in(output_location(config), summary["run_name"]))
    finally:
        bar.close()


def compare(
    source: str | Path | None = None,
    *,
    recipe: str = DEFAULT_RECIPE,
    arms: Sequence[str] = ("vanilla", "hardest", "vanilla-long"),
    seeds: Sequence[int] = (0, 1, 2),
    backbone: str | None = None,
    test_source: str | Path | None = None,
    epochs: int | None = None,
    name: str | None = None,
    output: str | Path | None = None,
    budget: Literal["steps", "compute"] = "steps",
    metric: Literal["knn_top1", "knn5shot_top1"] = "knn_top1",
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """Train every arm on every seed; return the finished comparison. Finished runs are not repeated.

    Args:
        source: see `pretrain`, as for recipe, backbone, test_source, epochs, output and settings.
        recipe: settings that all arms share.
        arms: what is compared; docs/comparing.md lists the arms.
        seeds: seeds of the runs; all arms have the same.
        backbone: network.
        test_source: labelled images for the evaluation.
        epochs: passes over the images.
        name: folder of the comparison; the same name continues it.
        output: folder or URI of all runs.
        budget: what all arms get alike.
        metric: what is compared first.
        settings: further settings.
        progress: show a progress bar.

    Raises:
        HvpRayError: the message tells what to do.
    """
    given = {
        "data.source": source,
        "method.backbone.name": backbone,
        "data.test_source": test_source,
        "training.epochs": epochs,
        "run.output": output,
    }
    config, _ = _configure(recipe, given, settings)
    prepare_ray_environment()
    from hvp_ray.comparison.compare import plan_comparison, run_comparison
    from hvp_ray.stream.connect import end_ray

    bar = _Bar(shown=progress)
    try:
        planned = plan_comparison(config, arms=arms, seeds=seeds, name=name, budget=budget, show=bar.write)
        report, _ = run_comparison(planned, metric=metric, show=bar.show_comparison)
    finally:
        bar.close()
        end_ray()
    return Comparison(path=report.html_path.parent, sentence=report.sentence, report=report.html_path)


def load_encoder(location: str | Path) -> "Encoder":
    """Return the encoder of a run that has ended.

    Args:
        location: the run's folder, its name under `runs/`, or its URI.

    Raises:
        CheckpointError: there is no such run, or it has not ended.
    """
    from hvp_ray.evaluation.encoder import Encoder
    from hvp_ray.methods.backbones import load_exported_backbone
    from hvp_ray.runs.find import find_run, read_config

    folder = find_run(str(location), needs=("config.json", "backbone.safetensors"))
    config = read_config(folder)
    return Encoder(load_exported_backbone(folder / "backbone.safetensors"), config.views, config.data)


def embed(encoder: "Encoder", images: "str | Path | Sequence[AnImage]") -> NDArray[np.float32]:
    """Return the features of images or of a source, [N, D], in their order; see `Encoder.embed`."""
    return encoder.embed(images)


def _configure(recipe: str | None, given: dict[str, Any], settings: Mapping[str, Any] | None) -> tuple[RunConfig, bool]:
    """Return the run, and whether its settings are those of an existing run."""
    chosen = {path: value for path, value in given.items() if value is not None}
    chosen |= dict(settings or {})
    recipe_config = get_recipe(recipe or DEFAULT_RECIPE)
    if recipe in OWN_RECIPES:
        return _fit_own(recipe_config, chosen)
    recorded = None
    if recipe is None and "run.name" in chosen:
        prepare_ray_environment()
        from hvp_ray.runs.record import recorded_settings

        place = {path: value for path, value in chosen.items() if path in ("run.name", "run.output")}
        recorded = recorded_settings(with_settings(recipe_config, place))
    return with_settings(recorded or recipe_config, chosen), recorded is not None


def _fit_own(recipe: RunConfig, chosen: dict[str, Any]) -> tuple[RunConfig, bool]:
    """Return a recipe that adapts itself, with the settings that are given; see `_configure`."""
    prepare_ray_environment()
    from hvp_ray.runs.fit_recipe import fit_own_recipe  # imports Ray

    with conditions_left_out():
        asked = with_settings(recipe, chosen)
    fitted = fit_own_recipe(asked, given=chosen)
    logger.warning("\n".join(fitted.lines))
    return with_settings(fitted.config, chosen), fitted.is_recorded


class _Bar:
    """A progress bar, on a terminal and in a notebook."""

    def __init__(self, *, shown: bool) -> None:
        self._is_shown = shown

    @cached_property
    def _bar(self) -> Any:
        """The bar, which appears with the first progress: notices before it have lines of their own."""
        from tqdm.auto import tqdm

        return tqdm(disable=not self._is_shown, unit="step", dynamic_ncols=True, leave=False)

    def report(self, progress: Any) -> bool:
        """Show the progress of a run; return that it shall not stop."""
        self.show_run(progress)
        return False

    def show_run(self, progress: Any) -> None:
        """Show the progress of a run."""
        self._bar.total, self._bar.n = progress.num_steps, progress.steps_done
        self._bar.set_postfix_str(f"loss {progress.loss:.4f}, {progress.images_per_second:.0f} images/s")

    def show_comparison(self, progress: Any) -> None:
        """Show the progress of a comparison."""
        self._bar.total, self._bar.n = progress.num_steps, progress.steps_done
        self._bar.set_postfix_str(f"{progress.num_done} of {progress.num_runs} runs done")

    def write(self, line: str) -> None:
        """Show a line beside the bar."""
        from tqdm import tqdm

        if self._is_shown:
            tqdm.write(line)

    def close(self) -> None:
        """End the bar."""
        if "_bar" in self.__dict__:
            self._bar.close()
