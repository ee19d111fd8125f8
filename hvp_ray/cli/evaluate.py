"""Evaluate the encoder of a run by k-NN, linear and logistic probes, few labels or fine-tuning, on its data or other data.

hvp-ray evaluate --checkpoint RUN [--protocol knn linear ...] [--data SOURCE [--test-data SOURCE]]

If --data holds the images of the run, the run's own split is used. The program counts test images that the run was trained
on. It recognises the run's images by their fingerprint, and by the bytes of three images if the run's data can be read.
Classes of training and test images are matched by name.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from hvp_ray.cli.command_line import exit_status, parse_options, say
from hvp_ray.config import DataConfig, RunConfig, config_to_dict
from hvp_ray.config.checks import AtLeast1, Checked, Positive
from hvp_ray.data.dataset import Dataset, have_same_images, open_dataset, split_source
from hvp_ray.data.labels import MatchedLabels, match_labels
from hvp_ray.data.order import choose_subset
from hvp_ray.data.source import Source, open_source
from hvp_ray.errors import ConfigError, DataError, HvpRayError, LabelError, TrainingError
from hvp_ray.launch.environment import prepare_ray_environment
from hvp_ray.runs.find import find_run, keep_results, read_config, read_entry

Protocol = Literal["knn", "linear", "logistic", "few-label", "finetune", "all"]
PROTOCOLS = tuple(name for name in get_args(Protocol) if name != "all")
SHOTS = (1, 5, 10)
AUTO_WORKERS_FROM_IMAGES = 5_000
"""With fewer images, starting a local Ray takes longer than the work."""
_DEFAULT_TEST_FRACTION = 0.2
_LINEAR_EPOCHS = 100
_FINE_TUNING_EPOCHS = 30
_FINE_TUNING_RATE = 5e-4
_LINE_SECONDS = 5.0
_DRAWN_IMAGES = 8

MEANINGS = {
    "knn": "the k most similar training images vote (cosine, weights exp(similarity / 0.07)); nothing is trained",
    "linear": "linear classifier on the frozen encoder, SGD; its learning rate was chosen on held-out training images",
    "logistic": "logistic regression on the frozen encoder; C was chosen on held-out training images",
    "few-label": "logistic regression with a few labelled images per class; mean over 20 draws of them",
    "finetune": "encoder and classifier trained together (AdamW, no setting chosen on the test images)",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the table."""

    protocol: str
    accuracy: float
    low: float
    high: float
    details: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Images:
    """Labelled images of one part of the data."""

    source: Source
    sample_ids: NDArray[np.int64]
    all_labels: NDArray[np.int64]
    """Labels of all images of the source, numbered as in the training source."""

    def labels(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the labels of these ids."""
        return self.all_labels[sample_ids]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainedOn:
    """The images that the run was trained on."""

    data: DataConfig
    fingerprint: str | None
    """Fingerprint of `data.source` when the run was prepared. None: the run did not record it."""

    def are(self, source: Source) -> bool:
        """Return whether a source holds the images of the run, whatever its name.

        Files of equal names and sizes share a fingerprint, so bytes are compared if the run's data can still be read.
        """
        if source.fingerprint() != self.fingerprint:
            return False
        own = _open_again(self.data)
        if own is None or own.fingerprint() != self.fingerprint:
            return True
        try:
            return have_same_images(own, source)
        except OSError:
            return True

    def count(self, images: Images) -> int | None:
        """Return how many of these images were trained on. None: unknown, because their source is another one."""
        if not self.are(images.source):
            return None
        return len(np.intersect1d(split_source(self.data, images.source)[0], images.sample_ids))


@functools.lru_cache(maxsize=1)
def _open_again(data: DataConfig) -> Source | None:
    """Return the source that a run was trained on. None: it cannot be opened."""
    try:
        return open_source(data.source, data)
    except HvpRayError:
        return None


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of an evaluation."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Folder or URI of a run, or its name under runs/."""

    protocol: tuple[Protocol, ...] = ("knn",)
    """What to measure."""

    data: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """Any data.source. None: the run's own."""

    test_data: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """Test images. None: the run's own if --data is the run's, else a held-out part."""

    intensity_range: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="BLACK WHITE")] = None
    """Black and white of images above 8 bits a channel. None: the run's data.intensity_range."""

    num_images: AtLeast1 | None = None
    """At most this many training images. None: all."""

    num_test_images: AtLeast1 | None = None
    """At most this many test images. None: all."""

    neighbours: tuple[AtLeast1, ...] = (10, 20, 100, 200)
    """Values of k."""

    epochs: AtLeast1 | None = None
    """None: linear 100, finetune 30."""

    learning_rate: Positive | None = None
    """Of finetune, per 256 images. None: 5e-4."""

    last_blocks: AtLeast1 = 1
    """Vision Transformers: the probes use class tokens of this many last blocks (DINO, ViT-S: 4)."""

    num_workers: AtLeast1 | Literal["auto"] = "auto"
    """Ray tasks that extract features; auto: 1 below 5,000 images, else all CPUs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs."""

    seed: int = 0
    """Of the classifiers (not of the run)."""

    no_cache: bool = False
    """Neither read nor write features in RUN/features."""

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """None: RUN/evaluation-DATA-TIME.json."""


def parse_arguments(arguments: list[str]) -> Options:
    """Return the options; see `parse_options`."""
    return parse_options(Options, arguments, program="hvp-ray evaluate", description=__doc__ or "")


def read_trained_on(run_dir: Path, config: RunConfig) -> TrainedOn:
    """Return what a run was trained on, as far as it recorded that.

    Raises:
        CheckpointError: config.json is damaged.
    """
    identity = read_entry(run_dir, "identity")
    fingerprint = identity.get("training data", identity.get("data fingerprint"))  # the key of earlier versions
    return TrainedOn(data=config.data, fingerprint=fingerprint if isinstance(fingerprint, str) else None)


def choose_data(trained_on: TrainedOn, options: Options) -> DataConfig:
    """Return the data to evaluate on: the run's own with its own split, or the data that the options name.

    Raises:
        DataError: `--data` cannot be used.
    """
    config = trained_on.data
    if options.data is not None and trained_on.are(open_source(options.data, config)):
        config = dataclasses.replace(config, source=options.data)
    elif options.data is not None:
        fraction = config.test_fraction or _DEFAULT_TEST_FRACTION
        config = dataclasses.replace(
            config, source=options.data, test_source=None, num_images=None, test_fraction=fraction
        )
    if options.test_data is not None:
        config = dataclasses.replace(config, test_source=options.test_data)
    if options.intensity_range is not None:
        config = dataclasses.replace(config, intensity_range=options.intensity_range)
    return config


def load_labels(dataset: Dataset) -> MatchedLabels:
    """Return the labels of training and test images.

    Raises:
        DataError: labels are missing or cannot be matched.
    """
    try:
        return match_labels(dataset)
    except LabelError as error:
        raise DataError(
            f"an evaluation needs images with labels, such as class folders: {error}. Give --data LABELLED_IMAGES (and "
            f"--test_data). What a run on images without labels learned, its report.html shows by nearest neighbours"
        ) from error


def choose_images(dataset: Dataset, labels: MatchedLabels, options: Options) -> tuple[Images, Images]:
    """Return labelled training and test images, at most as many as the options allow."""

    def choose(source: Source, ids: NDArray[np.int64], limit: int | None, all_labels: NDArray[np.int64]) -> Images:
        rows = choose_subset(len(ids), None if limit is None else min(limit, len(ids)))
        return Images(source=source, sample_ids=ids[rows], all_labels=all_labels)

    return (
        choose(dataset.source, labels.training_ids, options.num_images, labels.of_training),
        choose(dataset.test_source, labels.test_ids, options.num_test_images, labels.of_test),
    )


class Evaluation:
    """One encoder on one data set. Features and pixels are computed when a protocol first needs them."""

    def __init__(self, run_dir: Path, config: RunConfig, options: Options) -> None:
        from hvp_ray.evaluation.features import check_last_blocks
        from hvp_ray.methods.backbones import load_exported_backbone
        from hvp_ray.runs.intensity_check import check_intensities
        from hvp_ray.runs.location import with_absolute_paths

        trained_on = read_trained_on(run_dir, config)
        data = choose_data(trained_on, options)
        self.data = with_absolute_paths(dataclasses.replace(config, data=data)).data
        self.views = config.views
        self.options = options
        self.backbone_path = run_dir / "backbone.safetensors"
        self.cache_dir = run_dir / "features"
        self.backbone = load_exported_backbone(self.backbone_path)
        check_last_blocks(self.backbone, options.last_blocks)
        dataset = open_dataset(self.data)
        for remark in check_intensities(self.data, dataset, option="--intensity-range"):
            say(remark)
        labels = load_labels(dataset)
        self.training, self.test = choose_images(dataset, labels, options)
        self.num_trained_on = trained_on.count(self.test)
        self.remarks = [*labels.remarks, *self._describe_overlap(trained_on, is_own=trained_on.are(dataset.source))]
        self.num_classes = len(np.unique(self.training.labels(self.training.sample_ids)))

    def describe(self) -> str:
        """Describe the encoder and the images of the evaluation."""
        test_data = self.data.test_source or f"held-out part of {self.data.source}"
        remarks = "".join(f"\nremark    {remark}" for remark in self.remarks)
        return (
            f"encoder   {self.backbone_path}\n"
            f"training  {len(self.training.sample_ids):,} images of {self.num_classes} classes, {self.data.source}\n"
            f"test      {len(self.test.sample_ids):,} images, {test_data}{remarks}"
        )

    def _describe_overlap(self, trained_on: TrainedOn, *, is_own: bool) -> list[str]:
        """Return remarks on test images that the run was trained on, one sentence each."""
        remarks = []
        if is_own and self.options.data is not None and self.options.test_data is None:
            remarks.append(f"{self.data.source} holds the images of the run: the run's own split is used")
        if trained_on.fingerprint is not None and self.num_trained_on is None and not is_own:
            remarks.append("whether the run was trained on copies of these test images is not known")
        if trained_on.fingerprint is None:
            remarks.append("the run did not record what it was trained on: it may have been trained on test images")
        elif not is_own and self.data.source == trained_on.data.source:
            remarks.append(
                f"the images of {self.data.source} changed since the run: test images may have been trained on by it"
            )
        if self.num_trained_on:
            remarks.append(
                f"{self.num_trained_on:,} of {len(self.test.sample_ids):,} test images were trained on by this run (without "
                f"labels)"
            )
        return remarks

    def run(self, protocols: list[str]) -> Iterator[Row]:
        """Yield the rows of these protocols in order."""
        from hvp_ray.evaluation.feature_pool import start_workers

        num_workers = self.options.num_workers
        num_images = len(self.training.sample_ids) + len(self.test.sample_ids)
        if num_workers == "auto" and num_images < AUTO_WORKERS_FROM_IMAGES:
            num_workers = 1
        features = None
        if any(protocol != "finetune" for protocol in protocols):
            with start_workers(num_workers, self.options.device) as workers:
                features = self._extract(workers)
        for protocol in protocols:
            if protocol == "finetune":
                yield self._fine_tune()
            else:
                assert features is not None
                yield from self._probe(protocol, features)

    def draw_patch_maps(self, path: Path) -> list[Path]:
        """Draw attention and patch features of some test images; return the file, if the encoder is a Vision Transformer."""
        from hvp_ray.evaluation.features import load_evaluation_pixels
        from hvp_ray.evaluation.patch_maps import compute_patch_maps, has_patch_maps
        from hvp_ray.tracking.patch_figure import draw_patch_maps

        if not has_patch_maps(self.backbone, size_px=self.views.global_views.size_px):
            return []
        ids = self.test.sample_ids
        some = ids[np.linspace(0, len(ids) - 1, min(_DRAWN_IMAGES, len(ids))).astype(np.int64)]
        pixels, _ = load_evaluation_pixels(self.test.source, some, self.views, self.data)
        draw_patch_maps(path, pixels, compute_patch_maps(self.backbone, pixels, self.views, device=torch.device("cpu")))
        return [path]

    def _extract(self, workers: Any) -> Any:
        from hvp_ray.evaluation.feature_pool import FeatureCache, FeatureRequest, pool_features
        from hvp_ray.evaluation.linear import ProbeData

        found = []
        for part, images in (("training", self.training), ("test", self.test)):
            progress = Progress(f"features of the {part} images")
            result = pool_features(
                FeatureRequest(
                    backbone_path=self.backbone_path,
                    data=self.data,
                    views=self.views,
                    part="training" if part == "training" else "test",
                    sample_ids=images.sample_ids,
                    last_blocks=self.options.last_blocks,
                ),
                workers,
                cache=None if self.options.no_cache else FeatureCache(self.cache_dir),
                report_progress=progress,
            )
            self._warn_of_unreadable(part, images, result.sample_ids)
            found += [torch.from_numpy(result.features), torch.from_numpy(images.labels(result.sample_ids))]
        device = "cuda" if self.options.device != "cpu" and torch.cuda.is_available() else "cpu"
        return ProbeData(*(array.to(device) for array in found))

    def _warn_of_unreadable(self, part: str, images: Images, readable: NDArray[np.int64]) -> None:
        lost = np.setdiff1d(images.sample_ids, readable)
        if len(lost):
            say(
                f"{len(lost)} {part} image(s) unreadable and left out, the first {images.source.describe(int(lost[0]))}"
            )

    def _probe(self, protocol: str, data: Any) -> Iterator[Row]:
        from hvp_ray.evaluation.knn import knn_correct
        from hvp_ray.evaluation.linear import few_label_probe, linear_probe, logistic_probe

        seed = self.options.seed
        match protocol:
            case "knn":
                width = data.features.shape[1] // self.options.last_blocks  # the last block is at the end
                bank, queries = data.features[:, -width:], data.test_features[:, -width:]
                for neighbours in sorted({min(k, len(bank)) for k in self.options.neighbours}):
                    correct = knn_correct(bank, data.labels, queries, data.test_labels, neighbours=neighbours)
                    yield row("knn", correct.cpu().numpy(), {"k": neighbours})
            case "linear":
                epochs = self.options.epochs or _LINEAR_EPOCHS
                linear = linear_probe(data, epochs=epochs, seed=seed)
                yield row("linear", linear.correct, {"learning_rate": linear.learning_rate, "epochs": epochs})
            case "logistic":
                logistic = logistic_probe(data, seed=seed)
                details: dict[str, Any] = {"C": logistic.inverse_regularisation}
                yield row(
                    "logistic", logistic.correct, details | ({} if logistic.has_converged else {"converged": False})
                )
            case "few-label":
                for shots in SHOTS:
                    few = few_label_probe(data, shots=shots)
                    spread = float(few.draw_accuracies.std(ddof=1))
                    yield row(
                        "few-label", few.mean_correct, {"per_class": shots, "deviation_of_draws": round(spread, 4)}
                    )
            case _:
                raise ConfigError(f"unknown protocol {protocol!r}; expected one of {', '.join(PROTOCOLS)}")

    def _load_pixels(self, part: str, images: Images) -> Any:
        from hvp_ray.evaluation.features import load_evaluation_pixels
        from hvp_ray.evaluation.finetune import LabelledPixels

        try:
            pixels, readable = load_evaluation_pixels(images.source, images.sample_ids, self.views, self.data)
        except OSError as error:
            raise DataError(f"the {part} images cannot be read: {error}") from error
        self._warn_of_unreadable(part, images, readable)
        return LabelledPixels(pixels, images.labels(readable))

    def _fine_tune(self) -> Row:
        from hvp_ray.evaluation.finetune import FineTuneSettings, fine_tune

        training, test = self._load_pixels("training", self.training), self._load_pixels("test", self.test)
        use_gpu = self.options.device != "cpu" and torch.cuda.is_available()
        epochs = self.options.epochs or _FINE_TUNING_EPOCHS
        rate = self.options.learning_rate or _FINE_TUNING_RATE
        settings = FineTuneSettings(epochs=epochs, learning_rate_per_256=rate, seed=self.options.seed)
        device = torch.device("cuda" if use_gpu else "cpu")
        result = fine_tune(self.backbone, training, test, self.views, settings, device)
        details = {"learning_rate": rate, "epochs": epochs, "training_loss": round(result.losses[-1], 4)}
        return row("finetune", result.correct, details)


class Progress:
    """Prints a line every few seconds of an extraction, and at its end."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._line_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Print the progress if it is time."""
        if time.monotonic() - self._line_at > _LINE_SECONDS or done == total:
            self._line_at = time.monotonic()
            say(f"{self._title}: {done:,} of {total:,}")


def row(protocol: str, correct: NDArray[Any], details: dict[str, Any]) -> Row:
    """Return accuracy and its interval over test images as a row of the table."""
    from hvp_ray.evaluation.intervals import bootstrap_interval

    interval = bootstrap_interval(correct)
    return Row(protocol=protocol, accuracy=float(correct.mean()), low=interval.low, high=interval.high, details=details)


def describe_row(entry: Row) -> str:
    """Return a row as text."""
    details = ", ".join(
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in entry.details.items()
    )
    return f"{entry.protocol:<11} {entry.accuracy:>8.4f}   {entry.low:.4f} - {entry.high:.4f}   {details}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the results.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"the results cannot be written to {path}: {error.strerror or error}; give --json") from error


def evaluate(options: Options) -> None:
    """Evaluate; print and write the results.

    Raises:
        HvpRayError: the message tells the user what to do.
    """
    prepare_ray_environment()
    run_dir = find_run(options.checkpoint, option="--checkpoint ", needs=("config.json", "backbone.safetensors"))
    config = read_config(run_dir)
    torch.set_num_threads(config.training.torch_threads)  # as in training; more were slower on a busy machine
    protocols = [p for p in PROTOCOLS if p in options.protocol or "all" in options.protocol]
    evaluation = Evaluation(run_dir, config, options)
    say(evaluation.describe())
    rows: list[Row] = []
    diverged: TrainingError | None = None
    try:
        for entry in evaluation.run(protocols):
            if not rows:
                say(f"\n{'protocol':<11} accuracy   95 % interval     details")
            rows.append(entry)
            say(describe_row(entry))
    except TrainingError as error:
        if not rows:
            raise
        diverged = error  # the protocols before it have results
    say("\nAccuracy is top-1 on the test images. The protocols:")
    for protocol in protocols:
        say(f"  {protocol:<10} {MEANINGS[protocol]}")
    say("The interval (bootstrap) covers the choice of test images, and not the seed of the run.")
    name = Path(evaluation.data.source).stem
    path = run_dir / f"evaluation-{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path = path if options.json is None else options.json.expanduser()
    content = {
        "checkpoint": options.checkpoint if "://" in options.checkpoint else str(run_dir),
        "recipe": config.recipe,
        "run_seed": config.run.seed,
        "data": config_to_dict(evaluation.data),
        "num_training_images": len(evaluation.training.sample_ids),
        "num_test_images": len(evaluation.test.sample_ids),
        "num_test_images_trained_on": evaluation.num_trained_on,
        "num_classes": evaluation.num_classes,
        "last_blocks": options.last_blocks,
        "seed": options.seed,
        "interval": "95 % percentile bootstrap over test images, 10,000 draws",
        "results": [dataclasses.asdict(entry) for entry in rows],
        "torch": torch.__version__,
    }
    write_json(path, content)
    say(f"\nresults  {path}")
    figures = evaluation.draw_patch_maps(path.with_name(f"{path.stem}-attention.png"))
    for figure in figures:
        say(f"figure   {figure}")
    keep_results(options.checkpoint, run_dir, [path, *figures])
    if diverged is not None:
        raise diverged


def main(arguments: list[str]) -> int:
    """Run; return the exit status."""
    return exit_status(lambda: evaluate(parse_arguments(arguments)))
