"""Features of many images, by tasks on a Ray cluster or in this process, kept on disk.

A task reads, decodes and forwards a chunk of sample ids. Its process opens the data and builds the encoder once; the
encoder's weights come through the object store, so nodes share the data's path only. Without Ray the same function runs
here. `pipelines/evaluate.py` calls this; nothing in it knows about classifiers.
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

IMAGES_PER_TASK = 512
"""Images of a chunk; the pixels of a chunk of 224 px take 77 MB."""

_CACHE_FORMAT = 2

Part = Literal["training", "test"]

ReportProgress = Callable[[int, int], None]
"""(images done, images in all), after every chunk."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureRequest:
    """Which features of which images."""

    backbone_path: Path
    """A file that `export_backbone` wrote; read here, in the calling process."""
    data: DataConfig
    """Paths must be absolute, and visible on all nodes, where Ray does the work."""
    views: ViewsConfig
    """Size, centre crop, mean and standard deviation."""
    part: Part
    """Whether ids are of `Dataset.source` or of `Dataset.test_source`."""
    sample_ids: NDArray[np.int64]
    last_blocks: int = 1
    """See `extract_features`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageFeatures:
    """Features of the images that could be read."""

    features: NDArray[np.float32]
    """[M, D]."""
    sample_ids: NDArray[np.int64]
    """[M], in the order of the request."""


class FeatureCache:
    """Features as .npz files, one for each request, named by a digest of everything that they depend on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, key: str) -> ImageFeatures | None:
        """Return what was stored under `key`; None: nothing, or a file that cannot be read."""
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
        """Store under `key`, at once or not at all.

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
                f"features cannot be kept in {self._folder}: {error.strerror or error}; free some space, make it "
                "writable, or do without the cache"
            ) from error


def feature_key(request: FeatureRequest, weights: bytes, *, fingerprint: str, content: str, device: str) -> str:
    """Return a digest of everything that features depend on: weights, images, how they are cropped, and torch.

    A fingerprint covers names and sizes only. The key has the place of the images and `sample_digest` (`content`) too.
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
    *,
    num_workers: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    gpus_per_worker: float = 0.0,
    cache: FeatureCache | None = None,
    report_progress: ReportProgress | None = None,
) -> ImageFeatures:
    """Return the features of the readable images, in the order of the request.

    Chunks are the same for any number of workers, so the result is the same up to rounding, and bit for bit where
    workers and this process have the same processor and number of threads. A task whose process dies is repeated by Ray
    three times.

    Args:
        request: which features of which images.
        num_workers: chunks under way at once. Ray is used where it is initialised; otherwise this process does the work.
        device: what encoders run on.
        gpus_per_worker: share of a GPU that Ray reserves for a task.
        cache: where to look first, and to keep the result; None: nowhere.
        report_progress: called after every chunk; not where the result is found in the cache. None: nobody is told.

    Raises:
        CheckpointError: the encoder cannot be read.
        ConfigError: `last_blocks` does not fit the encoder, or the cache cannot be written.
        DataError: the data cannot be opened or read, or no image of the request is readable.
        StageError: tasks failed for another reason.
    """
    if num_workers < 1:
        raise ConfigError(f"{num_workers=} is not allowed: 1 or more")
    try:
        weights = request.backbone_path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{request.backbone_path} cannot be read: {error.strerror or error}") from error
    key = None
    if cache is not None:
        source = _source(_open_data(request.data), request.part)
        try:
            content = sample_digest(source)
        except OSError as error:
            raise DataError(f"the {request.part} images cannot be read: {first_line(error)}") from error
        key = feature_key(request, weights, fingerprint=source.fingerprint(), content=content, device=device)
        found = cache.load(key)
        if found is not None:
            return found
    report_progress = report_progress or (lambda _done, _total: None)
    num_chunks = max(1, -(-len(request.sample_ids) // IMAGES_PER_TASK))
    chunks = np.array_split(request.sample_ids, num_chunks)
    if ray.is_initialized():
        parts = _extract_by_tasks(request, weights, chunks, num_workers, device, gpus_per_worker, report_progress)
    else:
        parts = []
        for chunk in chunks:
            parts.append(_extract_chunk(np.frombuffer(weights, np.uint8), request, chunk, device))
            report_progress(sum(map(len, chunks[: len(parts)])), len(request.sample_ids))
    readable = [part for part in parts if len(part.sample_ids)]
    if not readable:
        raise DataError(
            f"none of the {len(request.sample_ids)} {request.part} images of {request.data.source!r} could be read"
        )
    result = ImageFeatures(
        features=np.concatenate([part.features for part in readable]),
        sample_ids=np.concatenate([part.sample_ids for part in readable]),
    )
    if cache is not None and key is not None:
        cache.write(key, result)
    return result


def _extract_by_tasks(
    request: FeatureRequest,
    weights: bytes,
    chunks: list[NDArray[np.int64]],
    num_workers: int,
    device: str,
    gpus_per_worker: float,
    report_progress: ReportProgress,
) -> list[ImageFeatures]:
    task = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_retries=3)(_extract_in_task)
    weights_ref = ray.put(np.frombuffer(weights, np.uint8))  # an array: processes of a node share one copy
    parts: dict[int, ImageFeatures] = {}
    under_way: dict[Any, int] = {}
    waiting = list(enumerate(chunks))[::-1]
    try:
        while waiting or under_way:
            while waiting and len(under_way) < num_workers:
                index, chunk = waiting.pop()
                under_way[task.remote(weights_ref, request, chunk, device)] = index
            ready, _ = ray.wait(list(under_way), num_returns=1)
            parts[under_way.pop(ready[0])] = ray.get(ready[0])
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
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)
    return [parts[index] for index in range(len(chunks))]


def _extract_in_task(
    weights: NDArray[np.uint8], request: FeatureRequest, sample_ids: NDArray[np.int64], device: str
) -> ImageFeatures:
    """Do `_extract_chunk` on the one CPU that the task has reserved."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return _extract_chunk(weights, request, sample_ids, device)


def _extract_chunk(
    weights: NDArray[np.uint8], request: FeatureRequest, sample_ids: NDArray[np.int64], device: str
) -> ImageFeatures:
    """Read, decode and forward a chunk."""
    source = _source(_open_data(request.data), request.part)
    backbone = _build_backbone(_Weights(weights), device)
    pixels, kept = load_evaluation_pixels(
        source,
        sample_ids,
        request.views,
        max_image_pixels=request.data.max_image_pixels,
        intensity_range=request.data.intensity_range,
    )
    features = extract_features(
        backbone, pixels, request.views, device=torch.device(device), last_blocks=request.last_blocks
    )
    return ImageFeatures(features=features.cpu().numpy(), sample_ids=kept)


class _Weights:
    """The bytes of an exported encoder, equal where their digests are."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """What `pool_features` may use."""

    num_workers: int
    device: Literal["cpu", "cuda"]
    gpus_per_worker: float


@contextlib.contextmanager
def start_workers(num_workers: int | Literal["auto"], device: Literal["auto", "cpu", "cuda"]) -> Iterator[Workers]:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray for more than one worker; end it afterwards.

    Call `prepare_ray_environment` before this module is imported.

    Args:
        num_workers: auto: all CPUs that are free, at most 64.
        device: auto: cuda where Ray, or this process without Ray, has a GPU.

    Raises:
        ConfigError: no cluster answers, this machine is too small, or no GPU although `device` is cuda.
    """
    wanted = num_workers if num_workers != "auto" else num_tasks_that_fit(this_machine())
    if not joins_cluster() and wanted == 1:
        yield Workers(num_workers=1, device=_resolve(device, float(torch.cuda.device_count())), gpus_per_worker=0.0)
        return
    connect_ray(lambda: plan_local_tasks(wanted, this_machine()))
    try:
        if num_workers == "auto":
            wanted = max(1, min(MAX_AUTO_WORKERS, int(ray.available_resources().get("CPU", 1.0))))
        gpus = float(ray.cluster_resources().get("GPU", 0.0))
        resolved = _resolve(device, gpus)
        # Rounded down, or the last worker would not fit.
        share = int(min(1.0, gpus / wanted) * 1000) / 1000 if resolved == "cuda" else 0.0
        yield Workers(num_workers=wanted, device=resolved, gpus_per_worker=share)
    finally:
        end_ray()


def _resolve(device: Literal["auto", "cpu", "cuda"], num_gpus: float) -> Literal["cpu", "cuda"]:
    if device == "cuda" and not num_gpus:
        raise ConfigError("device=cuda is not allowed: there is no GPU; use auto or cpu")
    return "cuda" if num_gpus and device != "cpu" else "cpu"
