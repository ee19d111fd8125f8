"""Extract features of many images by tasks on a Ray cluster, or in this process, and cache them on disk.

A task reads, decodes and forwards a chunk of sample ids. Its process opens the data and builds the encoder once. The
encoder's weights travel through the object store, so nodes share only the path of the data. Without Ray, the same function
runs in this process.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError
from torch import nn

from hvp_ray.config import DataConfig, ViewsConfig
from hvp_ray.data.dataset import Dataset, open_dataset, sample_digest
from hvp_ray.data.source import Source
from hvp_ray.errors import CheckpointError, ConfigError, DataError, HvpRayError, StageError, first_line
from hvp_ray.evaluation.features import extract_features, load_evaluation_pixels
from hvp_ray.methods.backbones import load_exported_backbone
from hvp_ray.stored_archive import check_stored_archive
from hvp_ray.stream.connect import connect_ray, end_ray, joins_cluster
from hvp_ray.stream.machine import MAX_AUTO_WORKERS, num_tasks_that_fit, plan_local_tasks, this_machine

logger = logging.getLogger(__name__)

AUTO_WORKERS_PER_GPU = 4
"""Processes that share a GPU: each has its own context, encoder and batch there."""

IMAGES_PER_TASK = 512
"""Size of a chunk; at 224 px its pixels take 77 MB."""

_CACHE_FORMAT = 2

Part = Literal["training", "test"]

ReportProgress = Callable[[int, int], None]
"""Receives (images done, all images) after every chunk."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureRequest:
    """Names the features of a set of images."""

    backbone_path: Path
    """A file that `export_backbone` wrote; the calling process reads it."""
    data: DataConfig
    """With Ray, paths must be absolute and visible on all nodes."""
    views: ViewsConfig
    """Size, centre crop, mean and standard deviation."""
    part: Part
    """Source of the ids: `Dataset.source` or `Dataset.test_source`."""
    sample_ids: NDArray[np.int64]
    last_blocks: int = 1
    """See `extract_features`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageFeatures:
    """Features of the readable images."""

    features: NDArray[np.float32]
    """[M, D]."""
    sample_ids: NDArray[np.int64]
    """[M], in request order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Resources of `pool_features`."""

    num_workers: int = 1
    """Chunks in flight. Ray is used if it is initialised; otherwise this process does the work."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the encoders."""
    gpus_per_worker: float = 0.0
    """Share of a GPU that Ray reserves for a task."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"num_workers={self.num_workers} is not allowed: 1 or more")


ONE_WORKER = Workers()


class FeatureCache:
    """Stores features as .npz files, one per request, named by a digest of everything that they depend on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, key: str) -> ImageFeatures | None:
        """Return what was stored under `key`; None if there is nothing, or the file cannot be read."""
        path = self._folder / f"{key}.npz"
        try:
            check_stored_archive(path, num_bytes=path.stat().st_size)
            with np.load(path, allow_pickle=False) as arrays:
                found = ImageFeatures(features=arrays["features"], sample_ids=arrays["sample_ids"])
            if found.features.ndim != 2 or found.sample_ids.shape != found.features.shape[:1]:
                raise ValueError(f"features {found.features.shape} of {found.sample_ids.shape} images")
            return found
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError, KeyError, MemoryError, NotImplementedError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s); its features are computed again", path, error)
            return None

    def write(self, key: str, found: ImageFeatures) -> None:
        """Store features under `key` atomically.

        Raises:
            ConfigError: the folder cannot be written.
        """
        path = self._folder / f"{key}.npz"
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, features=found.features, sample_ids=found.sample_ids)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise ConfigError(
                f"features cannot be written to {self._folder}: {error.strerror or error}; free some space, make it "
                "writable, or run without the cache"
            ) from error


def feature_key(request: FeatureRequest, weights: bytes, *, fingerprint: str, content: str, device: str) -> str:
    """Return a digest of everything that features depend on: weights, images, how they are cropped, and torch.

    A fingerprint covers only names and sizes, so the key also includes the images' place and `sample_digest` (`content`).
    """
    views, data = request.views, request.data
    parts = {
        "format": _CACHE_FORMAT,
        "backbone": hashlib.sha256(weights).hexdigest(),
        "data": fingerprint,
        "place": data.source if request.part == "training" or data.test_source is None else data.test_source,
        "content": content,
        "ids": hashlib.sha256(np.ascontiguousarray(request.sample_ids, dtype="<i8").tobytes()).hexdigest(),
        "max_image_pixels": data.max_image_pixels,
        "intensity_range": data.intensity_range,
        "channels": data.channels,
        "max_image_mib": data.max_image_mib,
        "size_px": views.global_views.size_px,
        "resize_px": views.evaluation_resize_px,
        "interpolation": views.evaluation_interpolation,
        "mean": views.mean,
        "std": views.std,
        "last_blocks": request.last_blocks,
        "torch": torch.__version__,
        "device": device,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pool_features(
    request: FeatureRequest,
    workers: Workers = ONE_WORKER,
    *,
    cache: FeatureCache | None = None,
    report_progress: ReportProgress = lambda _done, _total: None,
) -> ImageFeatures:
    """Return the features of the readable images, in request order.

    Chunks do not depend on the number of workers, so results agree up to rounding. They agree bit for bit if workers and
    this process have the same processor and number of threads. Ray retries a task whose process dies three times.

    Args:
        request: features to extract, and their images.
        workers: resources to use.
        cache: read first, and written with the result; None: no cache.
        report_progress: called after every chunk, unless the cache has the result.

    Raises:
        CheckpointError: the encoder cannot be read.
        ConfigError: `last_blocks` does not fit the encoder, or the cache cannot be written.
        DataError: the data cannot be opened or read, or no image of the request is readable.
        StageError: tasks failed for another reason.
    """
    try:
        weights = request.backbone_path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{request.backbone_path} cannot be read: {error.strerror or error}") from error
    if cache is None:
        return _extract(request, weights, workers, report_progress)
    source = _source(_open_data(request.data), request.part)
    try:
        content = sample_digest(source)
    except OSError as error:
        raise DataError(f"the {request.part} images cannot be read: {first_line(error)}") from error
    key = feature_key(request, weights, fingerprint=source.fingerprint(), content=content, device=workers.device)
    found = cache.load(key)
    if found is None:
        found = _extract(request, weights, workers, report_progress)
        cache.write(key, found)
    return found


def _extract(
    request: FeatureRequest, weights: bytes, workers: Workers, report_progress: ReportProgress
) -> ImageFeatures:
    num_images = len(request.sample_ids)
    chunks = np.array_split(request.sample_ids, max(1, -(-num_images // IMAGES_PER_TASK)))
    content = np.frombuffer(weights, np.uint8)  # an array: the processes of a node share one copy
    if ray.is_initialized():
        parts = _extract_by_tasks(request, content, chunks, workers, report_progress)
    else:
        parts = []
        for chunk in chunks:
            parts.append(_extract_chunk(content, request, chunk, workers.device))
            report_progress(sum(map(len, chunks[: len(parts)])), num_images)
    readable = [part for part in parts if len(part.sample_ids)]
    if not readable:
        raise DataError(f"none of the {num_images} {request.part} images of {request.data.source!r} could be read")
    return ImageFeatures(
        features=np.concatenate([part.features for part in readable]),
        sample_ids=np.concatenate([part.sample_ids for part in readable]),
    )


def _extract_by_tasks(
    request: FeatureRequest,
    weights: NDArray[np.uint8],
    chunks: list[NDArray[np.int64]],
    workers: Workers,
    report_progress: ReportProgress,
) -> list[ImageFeatures]:
    # After an error the others in flight end by themselves: Ray 2.60 aborts this process if `ray.cancel` meets a task that
    # is just ending, and tasks that fail for one reason end together.
    task = ray.remote(num_cpus=1, num_gpus=workers.gpus_per_worker, max_retries=3)(_extract_in_task)
    weights_ref = ray.put(weights)
    parts: dict[int, ImageFeatures] = {}
    in_flight: dict[Any, int] = {}
    waiting = list(enumerate(chunks))[::-1]
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < workers.num_workers:
                index, chunk = waiting.pop()
                in_flight[task.remote(weights_ref, request, chunk, workers.device)] = index
            ready, _ = ray.wait(list(in_flight), num_returns=1)
            parts[in_flight.pop(ready[0])] = ray.get(ready[0])
            report_progress(sum(len(chunks[index]) for index in parts), len(request.sample_ids))
    except RayTaskError as error:
        if isinstance(error.cause, HvpRayError):
            raise error.cause from error
        raise StageError(f"extracting features failed: {str(error).strip().splitlines()[-1]}") from error
    except RayError as error:
        raise StageError(
            f"the worker processes that extract features died: {str(error).strip().splitlines()[0]}; "
            "see Ray's logs, or use fewer workers"
        ) from error
    return [parts[index] for index in range(len(chunks))]


def _extract_in_task(
    weights: NDArray[np.uint8], request: FeatureRequest, sample_ids: NDArray[np.int64], device: str
) -> ImageFeatures:
    """Call `_extract_chunk` on the one CPU that the task reserves."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return _extract_chunk(weights, request, sample_ids, device)


def _extract_chunk(
    weights: NDArray[np.uint8], request: FeatureRequest, sample_ids: NDArray[np.int64], device: str
) -> ImageFeatures:
    """Read, decode and forward a chunk."""
    source = _source(_open_data(request.data), request.part)
    backbone = _build_backbone(_Weights(weights), device)
    pixels, kept = load_evaluation_pixels(source, sample_ids, request.views, request.data)
    features = extract_features(
        backbone, pixels, request.views, device=torch.device(device), last_blocks=request.last_blocks
    )
    return ImageFeatures(features=features.cpu().numpy(), sample_ids=kept)


class _Weights:
    """The bytes of an exported encoder, compared by their digest."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self.content = content
        self._digest = hashlib.sha256(content.data).digest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Weights) and self._digest == other._digest


@functools.lru_cache(maxsize=1)
def _build_backbone(weights: _Weights, device: str) -> nn.Module:
    """Build the encoder once in a process."""
    with tempfile.TemporaryDirectory(prefix="hvp-ray-") as folder:
        path = Path(folder) / "backbone.safetensors"
        weights.content.tofile(path)
        return load_exported_backbone(path).to(device)


@functools.lru_cache(maxsize=2)
def _open_data(config: DataConfig) -> Dataset:
    """Open the data once in a process."""
    return open_dataset(config)


def _source(dataset: Dataset, part: Part) -> Source:
    return dataset.source if part == "training" else dataset.test_source


@contextlib.contextmanager
def start_workers(num_workers: int | Literal["auto"], device: Literal["auto", "cpu", "cuda"]) -> Iterator[Workers]:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray for more than one worker, and end it afterwards.

    Call `prepare_ray_environment` before this module is imported.

    Args:
        num_workers: auto: all free CPUs, at most 64, and on GPUs at most 4 for each.
        device: auto: cuda if Ray, or without Ray this process, has a GPU.

    Raises:
        ConfigError: no cluster answers, this machine is too small, or `device` is cuda and there is no GPU.
    """
    wanted = num_workers if num_workers != "auto" else num_tasks_that_fit(this_machine())
    if not joins_cluster() and wanted == 1:
        yield Workers(device=_resolve(device, float(torch.cuda.device_count())))
        return
    connect_ray(lambda: plan_local_tasks(wanted, this_machine()))
    try:
        gpus = float(ray.cluster_resources().get("GPU", 0.0))
        resolved = _resolve(device, gpus)
        if num_workers == "auto":
            most = MAX_AUTO_WORKERS if resolved == "cpu" else min(MAX_AUTO_WORKERS, int(AUTO_WORKERS_PER_GPU * gpus))
            wanted = max(1, min(most, int(ray.available_resources().get("CPU", 1.0))))
        # Rounded down, or the last worker would not fit.
        share = int(min(1.0, gpus / wanted) * 1000) / 1000 if resolved == "cuda" else 0.0
        yield Workers(num_workers=wanted, device=resolved, gpus_per_worker=share)
    finally:
        end_ray()


def _resolve(device: Literal["auto", "cpu", "cuda"], num_gpus: float) -> Literal["cpu", "cuda"]:
    if device == "cuda" and not num_gpus:
        raise ConfigError("device=cuda is not allowed: there is no GPU; use auto or cpu")
    return "cuda" if num_gpus and device != "cpu" else "cpu"
