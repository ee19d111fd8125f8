"""Slow oracles written from the papers, and small configs and images for tests."""

import dataclasses
import io
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvp_ray.config import RunConfig, TransformConfig, ViewGroupConfig, ViewsConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.identity import Resolved
from hvp_ray.recipes import RECIPES, get_recipe
from hvp_ray.resolved_run import renderer_of
from hvp_ray.runs.record import resolve

NEUTRAL = TransformConfig(flip_probability=0.0, jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0)


def views_config(size_px: int = 32, transform: TransformConfig = NEUTRAL) -> ViewsConfig:
    return ViewsConfig(global_views=ViewGroupConfig(size_px=size_px, even=transform), evaluation_resize_px=size_px)


def groups_of_recipes() -> dict[str, ViewGroupConfig]:
    """Return the distinct view groups of all recipes, keyed by the first recipe that has each."""
    found: dict[str, ViewGroupConfig] = {}
    for name, make in RECIPES.items():
        views = make().views
        for kind, group in (("", views.global_views), (" local", views.local_views)):
            if group is not None and group not in found.values():
                found[name + kind] = group
    return found


def tiny_config(output: str, recipe: str = "simsiam-digits", **sections: dict[str, object]) -> RunConfig:
    """Return a digits recipe that trains in seconds; sections override fields, e.g. run={"seed": 1}."""
    config = get_recipe(recipe)
    small: dict[str, dict[str, object]] = {
        "run": {"output": output},
        "data": {"num_images": 200},
        "training": {"epochs": 2, "images_per_step": 16, "checkpoint_every_steps": 4},
        "tracking": {"uri": "none", "num_figure_images": 0, "knn_images": 40, "log_every_steps": 1},
        "cluster": {"num_view_workers": 1, "batches_in_flight": 3},
    }
    for section, values in sections.items():
        small[section] = small.get(section, {}) | values
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in small.items()}
    return dataclasses.replace(config, **changed)


def resolved_of(config: RunConfig) -> Resolved:
    """Return what a run's settings result in, in this process."""
    device = "cuda" if config.cluster.device == "cuda" else "cpu"
    return resolve(config, open_dataset(config.data), renderer=renderer_of(config.cluster), device=device)


def slow_hardest_pairs(projections: NDArray[np.float64], predictions: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return the pair of smallest similarity for each image, as the HVP paper writes it for SimSiam; [V, B, D]."""

    def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(sum(a * b) / (math.sqrt(sum(a * a)) * math.sqrt(sum(b * b))))

    num_views, num_images, _ = projections.shape
    chosen = []
    for image in range(num_images):
        best, best_pair = math.inf, (-1, -1)
        for n in range(num_views):
            for m in range(n + 1, num_views):
                z, p = projections[:, image], predictions[:, image]
                similarity = 0.5 * (cosine(p[n], z[m]) + cosine(p[m], z[n]))
                if similarity < best:
                    best, best_pair = similarity, (n, m)
        chosen.append(best_pair)
    return chosen


class ProgramInAPickle:
    """Runs a program when unpickled, which creates the file `proof`."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self._proof}",))


def encode(pixels: NDArray[np.uint8], kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def photograph_like(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Draw smooth colour fields with edges and a little noise, which resemble a photograph more than white noise does."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = []
    for _ in range(3):
        fx, fy, phase = generator.uniform(0.01, 0.12, 2).tolist() + [generator.uniform(0, 6)]
        wave = 110 + 90 * np.sin(fx * x + fy * y + phase)
        wave += np.where((x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(height, width) / 3) ** 2, 50, 0)
        channels.append(wave + generator.normal(0, 4, (height, width)))
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def slow_nt_xent_scores(
    views: NDArray[np.float64], pair: tuple[int, int], temperature: float, *, all_negatives: bool = False
) -> list[float]:
    """Return SimCLR's loss of one pair of views for each image, mean of both directions, by equation 1; [V, N, D]."""

    def similarity(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return math.exp(float(a @ b) / (float(np.linalg.norm(a)) * float(np.linalg.norm(b))) / temperature)

    num_views, num_images, _ = views.shape
    scores = []
    for image in range(num_images):
        directions = []
        for anchor, other in (pair, pair[::-1]):
            row = views[anchor, image]
            positive = similarity(row, views[other, image])
            negatives = sum(
                similarity(row, views[v, j])
                for v in (range(num_views) if all_negatives else pair)
                for j in range(num_images)
                if j != image
            )
            directions.append(-math.log(positive / (positive + negatives)))
        scores.append(sum(directions) / 2)
    return scores


def slow_cross_entropy(
    teacher_logits: NDArray[np.float64],
    student_logits: NDArray[np.float64],
    center: NDArray[np.float64],
    teacher_temperature: float,
    student_temperature: float,
) -> float:
    """Return -sum q log p of one teacher and one student output, as in DINO's algorithm 1; [K]."""

    def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
        shifted = np.exp(values - values.max())
        return shifted / shifted.sum()

    targets = softmax((teacher_logits - center) / teacher_temperature)
    predicted = softmax(student_logits / student_temperature)
    return float(-(targets * np.log(predicted)).sum())


def slow_dino_score(
    teacher: NDArray[np.float64],
    student: NDArray[np.float64],
    pair: tuple[int, int],
    local_views: tuple[int, ...],
    cross_entropy: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
) -> float:
    """Return DINO's loss of one image on two global and k local views: mean of 2 + 2k terms; [G, K], [G + L, K]."""
    num_views = len(teacher)
    terms = [
        cross_entropy(teacher[a], student[v])
        for a in pair
        for v in (*pair, *(num_views + local for local in local_views))
        if v != a
    ]
    assert len(terms) == 2 + 2 * len(local_views)
    return sum(terms) / len(terms)
