"""What a hard step costs in random steps, measured and by operation count, and which parts the cost is made of.

python benchmarks/step.py [--method NAME [--backbone NAME] [--resolution PX]] [--recipes NAME ...] [--images N]
    [--scoring-px N ...] [--scoring-precision bfloat16] [--scoring-batch-norm running] [--no-reuse-teacher]
    [--all-pairs] [--compile] [--cuda-graphs] [--repeats N] [--json FILE]

A random step trains on the views of the vanilla arm; a hard step scores all candidates first, at full resolution
(hardest-224) or at lower ones (hardest-112). hardest-224-reuse trains on the student's rows of scoring
(`selection.reuse_student`; Vision Transformers). hardest-224-rescue scores all views of half of the images
(`selection.rescue_share`). hardest-224-locals takes two global views as they are and chooses the local ones
(`selection.num_global_views=2`). With --images 8 or more, predicted probes a quarter of them in every fourth step and takes
random steps between: seconds and ledger are of a step with a probe, the ratio is that of all its steps.

All are the real step on the real network with made-up pixels; rendering is not part of it. On a CPU the time is CPU time of
one thread, which other load on the machine distorts little, and the steps take turns: the ratio is the median over the turns
of the ratio within a turn. On a GPU it is the device's own clock, and one setting follows the other, each with a network of
its own (so that compiled code is that of one resolution, as in a run, and the peak of memory is that of one setting); medians
are compared.

With --all-pairs the steps train on all pairs of the candidate views instead: all-pairs takes their plain mean, and
all-pairs-softmax and its like weigh them. ratio_to_all_pairs is then what the weights cost.

The ledger says what each part of a step takes, in random steps, from steps of their own: normalise (bytes to floats),
downscale (for scoring), score_networks and score (scoring's forward passes, and the rest of it), choose, gather,
forward_networks and forward (training's forward passes, and the loss), backward, update, collectives, copy. Networks are
not told apart with --compile.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results_file import describe_machine, open_results
from benchmarks.step_ledger import StepClock
from hvp_ray.config import RunConfig
from hvp_ray.costs.imaginary import LATE_STEP, made_up_batch
from hvp_ray.costs.operations import operations_of_step
from hvp_ray.distributed.world import World
from hvp_ray.methods import self_distillation as distillation
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import WEIGHTINGS, hard_step, vanilla_step
from hvp_ray.selection.proposals import HardnessPredictor
from hvp_ray.training.step import train_step
from hvp_ray.training.trainee import Trainee, build_trainee

RECIPES = (
    "simsiam-imagenet-r50-100ep",
    "simclr-imagenet-r50-100ep",
    "dino-imagenet-vits16-100ep",
    "ibot-imagenet-vits16-100ep",
)
ALL_PAIRS = "all-pairs"


def noise(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=dtype)


def settings_of(
    config: RunConfig, scoring_px: list[int] | None = None, *, all_pairs: bool = False
) -> dict[str, RunConfig]:
    """The settings that are compared, by name; hard steps score at full and half resolution, or as `scoring_px` says.

    At full resolution half of the images are also rescued, local views alone are chosen, and a Vision Transformer's rows are
    reused.
    """

    def with_selection(**changes: object) -> RunConfig:
        return dataclasses.replace(config, selection=dataclasses.replace(config.selection, every=1, **changes))

    size_px = config.views.global_views.size_px
    settings = {"random": with_selection(rule="first", limit=None)}
    if all_pairs:
        for weighting in WEIGHTINGS:
            name = ALL_PAIRS if weighting == "mean" else f"{ALL_PAIRS}-{weighting}"
            top_k = 2 if weighting == "top_k" else None
            settings[name] = with_selection(rule="all_pairs", limit=None, weighting=weighting, weight_top_k=top_k)
        return settings
    for px in scoring_px or [size_px, size_px // 2]:
        settings[f"hardest-{px}"] = with_selection(rule="hardest", scoring_resolution_px=None if px == size_px else px)
        if px == size_px and config.selection.num_candidate_views >= 3:
            settings[f"hardest-{px}-rescue"] = with_selection(rule="hardest", limit=None, rescue_share=0.5)
        if px == size_px and config.selection.num_local_views:
            settings[f"hardest-{px}-locals"] = with_selection(rule="hardest", num_global_views=2)
        if px == size_px and config.method.backbone.name.startswith("vit_") and not config.training.cuda_graphs:
            settings[f"hardest-{px}-reuse"] = with_selection(rule="hardest", reuse_student=True)
    images = config.training.images_per_step
    if images >= 8:
        probes = {"probe_images": images // 4, "scoring_resolution_px": None}
        settings["predicted"] = with_selection(rule="predicted", limit=None, score_always=False, **probes)
    return settings


def share_of_measured(setting: RunConfig) -> float:
    """Return which share of a setting's steps is measured; steps of rule predicted without a probe are random steps."""
    return 1 / setting.selection.probe_every if setting.selection.rule == "predicted" else 1.0


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.process_time()
    work()
    return time.process_time() - start


@dataclasses.dataclass(frozen=True)
class Measured:
    """A step of one setting."""

    seconds: list[float]
    peak_bytes: int | None
    """Of the device's memory; None on a CPU."""
    parts: dict[str, float]
    """Part of a step -> median seconds; see `benchmarks/step_ledger.py`."""


def prepare_step(trainee: Trainee, setting: RunConfig) -> Callable[[], object]:
    """Return the step of a setting on a batch that is on the device already."""
    batch = made_up_batch(setting, noise)
    local_pixels = None if batch.local_pixels is None else batch.local_pixels.to(trainee.device)
    batch = dataclasses.replace(batch, global_pixels=batch.global_pixels.to(trainee.device), local_pixels=local_pixels)
    if batch.probe_pixels is not None:
        batch = dataclasses.replace(batch, probe_pixels=batch.probe_pixels.to(trainee.device))
        trainee = dataclasses.replace(trainee, predictor=HardnessPredictor(delay=setting.selection.predictor_delay))
    return lambda: train_step(trainee, batch, setting, hard_step(setting.selection))


def measure_by_turns(settings: dict[str, RunConfig], repeats: int) -> dict[str, Measured]:
    """On a CPU."""
    device = torch.device("cpu")
    trainee = build_trainee(next(iter(settings.values())), World(), device, None)
    trainee.method.train()
    trainee.method.begin_step(LATE_STEP)
    clocks = {name: StepClock(device) for name in settings}
    steps = {name: prepare_step(trainee, setting) for name, setting in settings.items()}
    for step in steps.values():
        step()  # memory, kernels and the optimizer's state are made once
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(repeats):
        first = turn % len(names)  # each turn begins with another one, because a step leaves caches and memory behind
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(steps[name], device))
    for _ in range(max(1, repeats // 2)):
        for name, setting in settings.items():
            take_apart(trainee, setting, clocks[name])
    return {name: Measured(values, None, clocks[name].medians()) for name, values in seconds.items()}


def take_apart(trainee: Trainee, setting: RunConfig, clock: StepClock) -> None:
    """Run one step with a clock in it."""
    step = prepare_step(dataclasses.replace(trainee, stage=clock), setting)
    with contextlib.nullcontext() if setting.training.compile else clock.watching_networks():
        step()
    clock.end_step()


def measure_alone(setting: RunConfig, repeats: int, device: torch.device, lock: Path | None) -> Measured:
    """On a GPU, with a network of its own."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    trainee = build_trainee(setting, World(), device, None)
    trainee.method.train()
    trainee.method.begin_step(LATE_STEP)
    step = prepare_step(trainee, setting)
    step()  # compiles
    with exclusive(lock):
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = [seconds_of(step, device) for _ in range(repeats)]
        peak_bytes = torch.cuda.max_memory_allocated()
        clock = StepClock(device)
        for _ in range(3):
            take_apart(trainee, setting, clock)
        return Measured(seconds, peak_bytes, clock.medians(slice(1, None)))


@contextlib.contextmanager
def exclusive(lock: Path | None) -> Iterator[None]:
    """Have the device alone among the processes that name the same file, so that another one may compile meanwhile."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def config_of(recipe: str, backbone: str | None = None, resolution_px: int | None = None) -> RunConfig:
    """Return a recipe, on another network and with global views of another size where these are given."""
    config = get_recipe(recipe)
    if backbone is not None:
        other = dataclasses.replace(config.method.backbone, name=backbone)
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, backbone=other))
    if resolution_px is not None:
        group = dataclasses.replace(config.views.global_views, size_px=resolution_px)
        views = dataclasses.replace(config.views, global_views=group, evaluation_resize_px=resolution_px * 8 // 7)
        config = dataclasses.replace(config, views=views)
    return config


def measure(
    config: RunConfig,
    images: int,
    repeats: int,
    device: torch.device,
    *,
    scoring_px: list[int] | None = None,
    all_pairs: bool = False,
    compiled: bool = False,
    cuda_graphs: bool = False,
    lock: Path | None = None,
) -> Iterator[list[dict[str, object]]]:
    """Yield the numbers of each setting of a recipe, the random step first."""
    precision = config.training.precision if device.type == "cuda" else "float32"
    training = dataclasses.replace(
        config.training,
        images_per_step=images,
        precision=precision,
        compile=compiled or cuda_graphs,
        cuda_graphs=cuda_graphs,
        accumulation_steps=1,
    )
    config = dataclasses.replace(config, training=training)
    settings = settings_of(config, scoring_px, all_pairs=all_pairs)
    by_turns = measure_by_turns(settings, repeats) if device.type == "cpu" else None
    random: Measured | None = None
    mean_of_pairs: Measured | None = None
    subject = f"{config.method.name}.{config.method.backbone.name}.{config.views.global_views.size_px}"
    context = {
        "recipe": config.recipe,
        "images": images,
        "repeats": repeats,
        "precision": precision,
        "compiled": compiled or cuda_graphs,
        "cuda_graphs": cuda_graphs,
        "scoring_batch_norm": config.selection.scoring_batch_norm,
        "scoring_precision": config.selection.scoring_precision,
        "reuse_teacher": config.selection.reuse_teacher,
    }
    for name, setting in settings.items():
        selection = setting.selection
        context["views"] = f"{selection.num_candidate_views}+{selection.num_local_views or 0}"
        measured = by_turns[name] if by_turns else measure_alone(setting, repeats, device, lock)
        seconds = statistics.median(measured.seconds)
        random = random or measured
        mean_of_pairs = measured if name == ALL_PAIRS else mean_of_pairs
        spread = {"seconds_least": min(measured.seconds), "seconds_most": max(measured.seconds)}
        ratio = ratio_of(measured, random, by_turns=by_turns is not None)
        values = [
            ("seconds", seconds, "s"),
            ("ratio", 1.0 + share_of_measured(setting) * (ratio - 1.0), "random steps"),
            ("model_ratio", 1.0 if name == "random" else counted_ratio(setting), "random steps"),
        ]
        if mean_of_pairs is not None:
            ratio = ratio_of(measured, mean_of_pairs, by_turns=by_turns is not None)
            values.append(("ratio_to_all_pairs", ratio, "steps on all pairs"))
        if measured.peak_bytes is not None:
            values += [
                ("images_per_second", images / seconds, "images/s"),
                ("peak_memory_gib", measured.peak_bytes / 2**30, "GiB"),
            ]
        random_seconds = statistics.median(random.seconds)
        yield [
            {"name": f"step.{subject}.{name}.{quantity}", "value": value, "unit": unit} | context | spread
            for quantity, value, unit in values
        ] + [
            {"name": f"ledger.{subject}.{name}.{part}", "value": spent / random_seconds, "unit": "random steps"}
            | context
            | {"seconds": spent}
            for part, spent in measured.parts.items()
        ]


def ratio_of(measured: Measured, random: Measured, *, by_turns: bool) -> float:
    if by_turns:
        turns = zip(measured.seconds, random.seconds, strict=True)
        return statistics.median(seconds / of_random for seconds, of_random in turns)
    return statistics.median(measured.seconds) / statistics.median(random.seconds)


def print_ledger(of_settings: dict[str, dict[str, float]]) -> None:
    """Print what each part takes, in random steps: a row for each part, a column for each setting."""
    names = [name.rsplit(".", 1)[1] for name in of_settings]
    width = max(14, 2 + max(map(len, names)))
    print(f"\n{'part, in random steps':<24}" + "".join(f"{name:>{width}}" for name in names))
    for part in dict.fromkeys(part for parts in of_settings.values() for part in parts):
        cells = [parts.get(part) for parts in of_settings.values()]
        print(f"{part:<24}" + "".join(f"{'':>{width}}" if cell is None else f"{cell:>{width}.3f}" for cell in cells))
    print(flush=True)


def counted_ratio(setting: RunConfig) -> float:
    """Operations of the step in those of a random one; they hardly depend on how many images a step has."""
    few = dataclasses.replace(setting.training, images_per_step=8, compile=False)
    selection = setting.selection
    if selection.rule == "predicted":
        selection = dataclasses.replace(selection, probe_images=2)
    setting = dataclasses.replace(setting, training=few, selection=selection)
    hard, random = (operations_of_step(setting, kind(selection)) for kind in (hard_step, vanilla_step))
    return 1.0 + share_of_measured(setting) * (hard / random - 1.0)


def count_cross_entropies(repeats: int) -> list[dict[str, object]]:
    """DINO's scoring of 4 + 16 views: how many cross-entropies over 65,536 prototypes, and what they cost.

    Beside it the reference's way: the 18 terms of each of 128 candidates, here of 4 of them, times 32.
    """
    prototypes, images = 65_536, 2
    targets = torch.softmax(torch.randn(4, images, prototypes), dim=-1)
    logits = torch.randn(20, images, prototypes)
    with FlopCounterMode(display=False) as counter:
        distillation.cross_entropies(targets, logits, 0.1)
    products = counter.get_total_flops() / (2 * prototypes * images)

    def naive() -> None:
        for first in range(4):
            for view in range(9):
                for teacher_view in (first, (first + 1) % 4):
                    log_probabilities = torch.log_softmax(logits[view] / 0.1, dim=-1)
                    (targets[teacher_view] * log_probabilities).sum(dim=-1)

    cpu = torch.device("cpu")
    once = statistics.median(
        seconds_of(lambda: distillation.cross_entropies(targets, logits, 0.1), cpu) for _ in range(repeats + 2)
    )
    by_tuple = 32 * statistics.median(seconds_of(naive, cpu) for _ in range(repeats + 2))
    context = {"prototypes": prototypes, "images": images, "views": "4+16"}
    return [
        {"name": "scoring.dino.cross_entropies", "value": products - 4, "unit": "per image", **context},
        {"name": "scoring.dino.cross_entropies_of_128_candidates", "value": 128 * 18, "unit": "per image", **context},
        {"name": "scoring.dino.terms.seconds", "value": once, "unit": "s", **context},
        {"name": "scoring.dino.terms_of_128_candidates.seconds", "value": by_tuple, "unit": "s", **context},
    ]


def configs_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[RunConfig]:
    """Return what the command line asks for."""
    if options.method is None:
        if options.backbone or options.resolution:
            parser.error("--backbone and --resolution need --method")
        configs = [config_of(recipe) for recipe in options.recipes or RECIPES]
    else:
        if options.recipes:
            parser.error("--method or --recipes, not both")
        recipe = next(recipe for recipe in RECIPES if recipe.startswith(f"{options.method}-"))
        configs = [config_of(recipe, options.backbone, options.resolution)]
    changes = {
        "scoring_batch_norm": options.scoring_batch_norm,
        "scoring_precision": options.scoring_precision,
        "reuse_teacher": not options.no_reuse_teacher,
    }
    return [
        dataclasses.replace(config, selection=dataclasses.replace(config.selection, **changes)) for config in configs
    ]


def scoring_px_of(options: argparse.Namespace, config: RunConfig) -> list[int] | None:
    if options.scoring_px is None and options.method is not None:
        size_px = config.views.global_views.size_px
        return [size_px, size_px // 2, size_px * 3 // 7, size_px * 5 // 14]
    return options.scoring_px


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", help=f"default: {' '.join(RECIPES)}")
    parser.add_argument("--method", choices=[recipe.split("-")[0] for recipe in RECIPES], help="instead of --recipes")
    parser.add_argument("--backbone", help="another network of timm's, with --method")
    parser.add_argument("--resolution", type=int, help="another size of global views in px, with --method")
    parser.add_argument("--images", type=int, default=4, help="images per step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--scoring-px",
        nargs="+",
        type=int,
        help="resolutions of hard steps' scoring (default: full, half; with --method also 3/7 and 5/14: 96 and 80 of 224)",
    )
    parser.add_argument("--scoring-batch-norm", choices=["batch", "running"], default="batch")
    parser.add_argument(
        "--scoring-precision", choices=["training", "bfloat16"], default="training", help="training: float32 on a CPU"
    )
    parser.add_argument("--no-reuse-teacher", action="store_true", help="selection.reuse_teacher=False")
    parser.add_argument("--all-pairs", action="store_true", help="training on all pairs, weighted in every way")
    parser.add_argument("--compile", action="store_true", help="torch.compile; GPUs only")
    parser.add_argument("--cuda-graphs", action="store_true", help="--compile, and scoring as a CUDA graph")
    parser.add_argument("--lock", type=Path, help="time a step only while no other process holds this file")
    parser.add_argument("--json", type=Path, help="write one JSON object a line, each as soon as it is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (options.compile or options.cuda_graphs) and device.type == "cpu":
        parser.error("--compile and --cuda-graphs work on GPUs only, and there is none")
    gpu = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    context = describe_machine("torch") | gpu
    print(", ".join(f"{name} {value}" for name, value in context.items()) + f", {options.images} images a step")
    with open_results(options.json, context) as keep:
        for config in configs_of(options, parser):
            to_all_pairs = f"{'to mean':>8}" if options.all_pairs else ""
            print(f"{'setting':<52}{'seconds':>10}{'ratio':>8}{'model':>8}{to_all_pairs}{'GiB':>8}")
            ledger: dict[str, dict[str, float]] = {}
            numbers = measure(
                config,
                options.images,
                options.repeats,
                device,
                scoring_px=scoring_px_of(options, config),
                all_pairs=options.all_pairs,
                compiled=options.compile,
                cuda_graphs=options.cuda_graphs,
                lock=options.lock,
            )
            for results in numbers:
                keep(results)
                name = str(results[0]["name"]).removeprefix("step.").removesuffix(".seconds")
                quantities = {
                    str(result["name"]).rsplit(".", 1)[1]: float(str(result["value"]))
                    for result in results
                    if str(result["name"]).startswith("step.")
                }
                columns = (
                    "ratio",
                    "model_ratio",
                    *(["ratio_to_all_pairs"] if options.all_pairs else []),
                    "peak_memory_gib",
                )
                cells = "".join(
                    f"{quantities[column]:>8.3f}" if column in quantities else " " * 8 for column in columns
                )
                print(f"{name:<52}{quantities['seconds']:>10.4f}{cells}", flush=True)
                ledger[name] = {
                    str(result["name"]).rsplit(".", 1)[1]: float(str(result["value"]))
                    for result in results
                    if str(result["name"]).startswith("ledger.")
                }
            print_ledger(ledger)
        if device.type == "cpu" and options.method in (None, "dino"):
            terms = count_cross_entropies(options.repeats)
            keep(terms)
            for term in terms:
                print(f"{term['name']:<52}{term['value']:>10.4g} {term['unit']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
