"""How much of the hardness a cheaper way of scoring keeps: at every checkpoint of a run, on its own images.

python benchmarks/cheap_scoring.py RUN [--images N] [--scoring-px PX ...] [--settings NAME ...] [--steps N ...]
    [--training-loss] [--json FILE]

RUN is the folder of a run that kept its checkpoints (training.keep_checkpoints). At each of them the same candidates of the
same images are scored by each setting; a setting is judged by what its choice is worth under full scoring:

    kept = (full loss of the setting's choice - mean of all candidates) / (full loss of the hardest - mean of all candidates)

1: as hard as the hardest; 0: no harder than a random candidate. `agree` is the share of images whose chosen candidate is the
same, `rank` the mean over the images of Spearman's correlation of the pairs' scores.

The ceiling is full scoring itself with other images in the batch (`other-batch`): where BatchNorm or negatives look at the
batch, hardness is not a property of the image alone. `running` scores with the running statistics of BatchNorm, `bfloat16`
in that precision; names are joined where settings are (`112px-bfloat16`).
`earlier-weights` scores at full resolution with the checkpoint before: what scorers elsewhere in the cluster could do.
`overlap` chooses the pair of least overlap, without a network. `tokens-50` and `tokens-25` are for Vision Transformers: full
resolution, but only that percentage of the patches, drawn for each view.

`trained` (with --training-loss) asks the same of the loss that training would see: the chosen views of a batch without the
others, each slot with BatchNorm statistics of its own. It is one number for all images, and 1 means as hard as what full
scoring chooses; another choice may be harder.

What the logged scores answer alone (numbers of views, shares, limits, predictions), `hardness.py` replays.

Numbers are exact on one machine; `interval` is the standard error of `kept` over the images.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

import numpy as np
import torch
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn

from benchmarks.replay.scores import score_of
from benchmarks.results_file import describe_machine, open_results
from hvp_ray.config import RunConfig, config_from_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.distributed.world import World
from hvp_ray.errors import HvpRayError
from hvp_ray.methods.method import StepPosition
from hvp_ray.runs.checkpoint import Checkpoint, CheckpointStore
from hvp_ray.runs.rank import build_order
from hvp_ray.selection import Candidates, CandidateScores, Selection, choose_views, hard_step
from hvp_ray.selection.scoring import batch_norm_for_scoring
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.render_batch import build_render_context, render_batch
from hvp_ray.training.pixel_views import PixelViews
from hvp_ray.training.step import score_candidates
from hvp_ray.training.trainee import Trainee, build_trainee
from hvp_ray.views.geometry import crop_iou

Score = Callable[[], CandidateScores]


def hard_config(config: RunConfig, *, images_per_step: int, device: torch.device) -> RunConfig:
    """Return the run as one trainer on `device` that scores everything at full resolution."""
    precision = config.training.precision if device.type == "cuda" else "float32"
    return dataclasses.replace(
        config,
        selection=dataclasses.replace(
            config.selection.with_rule("hardest"),
            every=1,
            limit=None,
            rescue_share=1.0,
            scoring_resolution_px=None,
            scoring_batch_norm="batch",
            scoring_precision="training",
            reuse_teacher=False,
        ),
        training=dataclasses.replace(
            config.training,
            images_per_step=images_per_step,
            accumulation_steps=1,
            compile=False,
            precision=precision,
            initial_weights=None,
        ),
        cluster=dataclasses.replace(config.cluster, num_trainers=1, min_trainers=None, device=device.type),
    )


class ScoredImages:
    """Batches of candidates, and a trainee whose weights are those of one checkpoint after the other."""

    def __init__(self, config: RunConfig, *, num_images: int, device: torch.device) -> None:
        self.config = config
        self.device = device
        dataset = open_dataset(config.data)
        order = build_order(config, dataset)
        request_of = requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})
        context = build_render_context(config, dataset, "cpu")
        num_batches = max(1, min(num_images // config.training.images_per_step, order.steps_per_epoch))
        copy_to_device = CopyToDevice(device)
        self.batches: list[DeviceBatch] = [
            copy_to_device(render_batch(context, request_of(step))) for step in range(num_batches)
        ]
        for batch in self.batches:
            batch.wait()
        self.candidates: Candidates = hard_step(config.selection).candidates(config.views)
        self.trainee: Trainee = build_trainee(config, World(), device, None)
        self.trainee.method.train()
        self._pixels = [PixelViews.of(batch) for batch in self.batches]
        self._steps_per_epoch = order.steps_per_epoch

    @property
    def num_images(self) -> int:
        return len(self.batches) * self.config.training.images_per_step

    def load(self, checkpoint: Checkpoint, num_steps: int) -> None:
        """Take the weights of a checkpoint, and the temperatures of its step."""
        self.trainee.method.load_state_dict(checkpoint.method)
        position = StepPosition(step=checkpoint.step, num_steps=num_steps, steps_per_epoch=self._steps_per_epoch)
        self.trainee.method.begin_step(position)

    def score(self, **selection: Any) -> CandidateScores:
        """Score all candidates of all batches with these settings."""
        config = dataclasses.replace(self.config, selection=dataclasses.replace(self.config.selection, **selection))
        return _join([self._score(pixels, config, step) for step, pixels in enumerate(self._pixels)])

    def score_in_other_batches(self) -> CandidateScores:
        """Score at full resolution, each image among others than in `score`."""
        per_batch, num_batches = self.config.training.images_per_step, len(self.batches)
        # Image i of batch k goes to batch (k + i) mod K: nobody keeps more than a K-th of the old companions.
        places = torch.arange(self.num_images).view(num_batches, per_batch)
        moved = torch.stack(
            [
                torch.cat([places[(k - shift) % num_batches, shift::num_batches] for shift in range(num_batches)])
                for k in range(num_batches)
            ]
        )
        together = PixelViews(
            global_pixels=torch.cat([pixels.global_pixels for pixels in self._pixels], dim=1),
            local_pixels=_cat_if([pixels.local_pixels for pixels in self._pixels]),
            masks=_cat_if([pixels.masks for pixels in self._pixels]),
        )
        scores = _join([self._score(_take(together, images), self.config, k) for k, images in enumerate(moved)])
        back = moved.flatten().argsort().to(self.device)
        of_locals = None if scores.locals_BPL is None else scores.locals_BPL[back]
        return CandidateScores(pairs_BP=scores.pairs_BP[back], locals_BPL=of_locals)

    @contextlib.contextmanager
    def keeping_tokens(self, fraction: float) -> Iterator[None]:
        """Drop patches of Vision Transformers while scoring."""
        transformers = [module for module in self.trainee.method.modules() if hasattr(module, "patch_drop")]
        before: list[nn.Module] = [module.patch_drop for module in transformers]
        for module in transformers:
            module.patch_drop = PatchDropout(1.0 - fraction, num_prefix_tokens=int(module.num_prefix_tokens)).train()
        try:
            yield
        finally:
            for module, kept in zip(transformers, before, strict=True):
                module.patch_drop = kept

    def overlap(self) -> CandidateScores:
        """Return minus the overlap of the crops of each pair as its score."""
        plans, pairs = [batch.global_views.plan for batch in self.batches], self.candidates.pairs
        overlaps = [crop_iou(plan.top, plan.left, plan.height, plan.width, pairs) for plan in plans]
        ious = torch.from_numpy(np.concatenate(overlaps)).to(self.device)
        of_locals = None
        if self.candidates.num_local_views:
            of_locals = ious.new_zeros((*ious.shape, self.candidates.num_local_views))
        return CandidateScores(pairs_BP=-ious.float(), locals_BPL=of_locals)

    def choose(self, scores: CandidateScores) -> Selection:
        """Choose the hardest candidate of every image."""
        return choose_views("hardest", self.candidates, num_images=self.num_images, device=self.device, scores=scores)

    def training_loss(self, selection: Selection) -> float:
        """Return the loss that training on this choice would see, mean over the batches; nothing is updated."""
        per_batch = self.config.training.images_per_step
        losses = []
        for step, pixels in enumerate(self._pixels):
            images = slice(step * per_batch, (step + 1) * per_batch)
            of_locals = None if selection.local_indices is None else selection.local_indices[:, images]
            chosen = pixels.gather(
                Selection(pair_indices=None, view_indices=selection.view_indices[:, images], local_indices=of_locals)
            )
            torch.manual_seed(step)  # the same drop path for all choices
            with torch.no_grad(), batch_norm_for_scoring(self.trainee.method, "batch"):
                losses.append(self.trainee.method(chosen.normalised(self.config.views)).loss)
        return float(torch.stack(losses).mean())

    def random_training_loss(self) -> float:
        """Return the training loss of random views: without local views, the mean over all pairs, each trained on alone."""
        if self.candidates.num_local_views:
            first = choose_views("first", self.candidates, num_images=self.num_images, device=self.device)
            return self.training_loss(first)
        pairs = self.candidates.pairs_on(self.device)[:, :, None].expand(-1, -1, self.num_images)
        return float(np.mean([self.training_loss(Selection(pair_indices=None, view_indices=pair)) for pair in pairs]))

    def _score(self, pixels: PixelViews, config: RunConfig, step: int) -> CandidateScores:
        return score_candidates(self.trainee, pixels, self.candidates, config, step)


def _take(pixels: PixelViews, images: Tensor) -> PixelViews:
    return PixelViews(
        global_pixels=pixels.global_pixels[:, images],
        local_pixels=None if pixels.local_pixels is None else pixels.local_pixels[:, images],
        masks=None if pixels.masks is None else pixels.masks[:, images],
    )


def _cat_if(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present, dim=1) if present else None


def _join(scores: Sequence[CandidateScores]) -> CandidateScores:
    of_locals = [part.locals_BPL for part in scores if part.locals_BPL is not None]
    return CandidateScores(
        pairs_BP=torch.cat([part.pairs_BP for part in scores]).float(),
        locals_BPL=torch.cat(of_locals).float() if of_locals else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What a setting's choices are worth under full scoring."""

    kept: float
    interval: float
    agree: float
    rank: float
    trained: float | None = None


def judge(full: CandidateScores, cheap: CandidateScores, images: ScoredImages) -> Kept:
    """Compare the choices of `cheap` with those of `full`."""
    k = images.candidates.num_chosen_local_views
    of_full, of_cheap = images.choose(full), images.choose(cheap)
    mean = full.mean(k)
    gained = score_of(full, of_cheap) - mean
    most = score_of(full, of_full) - mean
    ratio = float(gained.mean() / most.mean())
    residual = gained - ratio * most  # linearised: the error of a ratio of means
    error = float(residual.std() / len(residual) ** 0.5 / most.mean())
    assert of_full.pair_indices is not None
    same = of_full.pair_indices == of_cheap.pair_indices
    if of_full.local_indices is not None and of_cheap.local_indices is not None:
        same &= (of_full.local_indices == of_cheap.local_indices).all(dim=0)
    return Kept(
        kept=ratio,
        interval=error,
        agree=float(same.float().mean()),
        rank=float(rank_correlation(full.best_of_pairs(k), cheap.best_of_pairs(k)).mean()),
    )


def rank_correlation(first_BP: Tensor, second_BP: Tensor) -> Tensor:
    """Return Spearman's correlation of each row, [B]; ties keep their order."""
    ranks = [values.argsort(dim=1).argsort(dim=1).double() for values in (first_BP, second_BP)]
    centred = [rank - rank.mean(dim=1, keepdim=True) for rank in ranks]
    return (centred[0] * centred[1]).sum(dim=1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))


def settings_of(images: ScoredImages, scoring_px: Sequence[int]) -> dict[str, Score]:
    """The ways of scoring that need no other weights, by name."""

    def with_tokens(fraction: float) -> Score:
        def score() -> CandidateScores:
            with images.keeping_tokens(fraction):
                return images.score()

        return score

    settings: dict[str, Score] = {"other-batch": images.score_in_other_batches}
    for px in scoring_px:
        settings[f"{px}px"] = lambda px=px: images.score(scoring_resolution_px=px)
    cheaper: dict[str, dict[str, str]] = {
        "bfloat16": {"scoring_precision": "bfloat16"},
        "running": {"scoring_batch_norm": "running"},
        "bfloat16-running": {"scoring_precision": "bfloat16", "scoring_batch_norm": "running"},
    }
    for name, selection in cheaper.items():
        settings[name] = lambda selection=selection: images.score(**selection)
        for px in scoring_px:
            settings[f"{px}px-{name}"] = lambda px=px, selection=selection: images.score(
                scoring_resolution_px=px, **selection
            )
    takes_all_patches = images.config.views.masks is not None  # iBOT's loss is one of patches
    if not takes_all_patches and any(hasattr(module, "patch_drop") for module in images.trainee.method.modules()):
        settings |= {"tokens-50": with_tokens(0.5), "tokens-25": with_tokens(0.25)}
    settings["overlap"] = images.overlap
    return settings


def main() -> int:
    """Measure every checkpoint of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument(
        "--images-per-step", type=int, help="images that are scored together; default: those of the run"
    )
    parser.add_argument("--scoring-px", nargs="+", type=int, help="default: 1/2, 3/7, 5/14 and 2/7 of the full size")
    parser.add_argument("--settings", nargs="+", help="only these, by name")
    parser.add_argument("--steps", nargs="+", type=int, help="only these checkpoints; 0: before training")
    parser.add_argument(
        "--training-loss", action="store_true", help="also ask the loss of training; half as long again"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--json", type=Path, help="write one JSON object a line, each as soon as it is measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        record = json.loads((options.run / "config.json").read_text())
        config = config_from_dict(record["config"])
        store = CheckpointStore(str(options.run / "checkpoints"), run_identity=record["run_identity"], keep=1)
        steps = store.committed_steps()
    except (OSError, ValueError, KeyError, HvpRayError) as error:
        parser.error(f"{options.run} is not the folder of a run: {error}")
    if not steps:
        parser.error(f"{options.run} has no checkpoints; train with --training.keep_checkpoints 20")
    num_steps = steps[-1]
    together = min(options.images_per_step or config.training.images_per_step, options.images)
    hard = hard_config(config, images_per_step=together, device=device)
    images = ScoredImages(hard, num_images=options.images, device=device)
    size_px = config.views.global_views.size_px
    step_px = images.trainee.method.patch_px
    parts = [size_px * part // 14 // step_px * step_px for part in (7, 6, 5, 4)]
    sizes = options.scoring_px or list(dict.fromkeys(px for px in parts if px >= 4))
    settings = settings_of(images, sizes)
    unknown = set(options.settings or ()) - {*settings, "earlier-weights"}
    if unknown:
        parser.error(f"unknown settings {sorted(unknown)}; known: {' '.join(settings)} earlier-weights")
    untrained = Checkpoint(
        step=0, method={k: v.clone() for k, v in images.trainee.method.state_dict().items()}, optimizer={}
    )
    context = {
        **describe_machine("torch"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "recipe": config.recipe,
        "backbone": config.method.backbone.name,
        "views": f"{images.candidates.num_views}+{images.candidates.num_local_views}",
        "images": images.num_images,
        "images_per_step": images.config.training.images_per_step,
        "run_steps": num_steps,
    }
    print(", ".join(f"{name} {value}" for name, value in context.items()))
    print(f"{'step':>7}  {'setting':<18}{'kept':>8}{'+-':>7}{'agree':>8}{'rank':>8}{'trained':>9}{'seconds':>10}")
    wanted = {name: score for name, score in settings.items() if options.settings is None or name in options.settings}
    wants_earlier = options.settings is None or "earlier-weights" in options.settings
    earlier: CandidateScores | None = None
    with open_results(options.json, context) as keep:
        for step in [step for step in (0, *steps) if options.steps is None or step in options.steps]:
            images.load(untrained if step == 0 else store.load(step, device), num_steps)
            full = images.score()
            if options.training_loss:
                random, hardest = images.random_training_loss(), images.training_loss(images.choose(full))
            ways = dict(wanted)
            if wants_earlier and earlier is not None:
                ways["earlier-weights"] = lambda scores=earlier: scores
            for name, score in ways.items():
                begun = time.process_time()
                cheap = score()
                seconds = time.process_time() - begun
                kept = judge(full, cheap, images)
                if options.training_loss:
                    loss = images.training_loss(images.choose(cheap))
                    kept = dataclasses.replace(kept, trained=(loss - random) / (hardest - random))
                trained = "" if kept.trained is None else f"{kept.trained:.3f}"
                print(
                    f"{step:>7}  {name:<18}{kept.kept:>8.3f}{kept.interval:>7.3f}{kept.agree:>8.3f}{kept.rank:>8.3f}"
                    f"{trained:>9}{seconds:>10.1f}",
                    flush=True,
                )
                result = {
                    "name": f"cheap_scoring.{config.method.name}.{name}.kept",
                    "value": kept.kept,
                    "unit": "fraction",
                }
                keep([result | dataclasses.asdict(kept) | {"step": step}])
            earlier = full
    return 0


if __name__ == "__main__":
    sys.exit(main())
