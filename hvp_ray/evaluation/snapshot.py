"""Evaluate snapshots of an encoder by k-NN during training. Imports neither Ray nor the trainer."""

import dataclasses

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.distributed.shard import whole
from hvp_ray.errors import CheckpointError, first_line
from hvp_ray.evaluation.report import KnnData, evaluate_encoder, load_knn_data
from hvp_ray.methods.backbones import build_backbone


def snapshot_encoder(encoder: nn.Module) -> bytes:
    """Return the weights of an encoder as safetensors; if it is sharded, all ranks call this."""
    return save({name: whole(tensor.detach()).cpu().contiguous() for name, tensor in encoder.state_dict().items()})


class SnapshotKnn:
    """Evaluates snapshots of one run. The first snapshot loads and crops the images.

    Args:
        config: the run.
        device: device to evaluate on.
        fingerprint: fingerprint of the run's data, see `open_dataset`.
        test_data: fingerprint of the run's test images, see `open_dataset`.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        fingerprint: str | None = None,
        test_data: str | None = None,
    ) -> None:
        self._config = config
        self._device = device
        self._fingerprint = fingerprint
        self._test_data = test_data
        self._encoder: nn.Module | None = None
        self._knn_data: KnnData | None = None

    def evaluate(self, snapshot: bytes) -> dict[str, float]:
        """Return the k-NN metrics of a snapshot; an empty dict if the data has no labels or no test images.

        Raises:
            CheckpointError: not a snapshot, or one of another encoder.
            DataError: the images have changed since the run was prepared.
        """
        if self._encoder is None:
            dataset = open_dataset(self._config.data, fingerprint=self._fingerprint, test_data=self._test_data)
            self._knn_data = load_knn_data(self._config, dataset)
            settings = dataclasses.replace(self._config.encoder, pretrained=False)
            self._encoder = build_backbone(settings, drop_path=0.0).to(self._device)
        if self._knn_data is None:
            return {}
        try:
            self._encoder.load_state_dict(load(snapshot))
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"a snapshot for the k-NN during training holds no weights of this encoder ({first_line(error)}); delete "
                f"the folder knn_pending of the run to continue without its snapshots"
            ) from error
        results = evaluate_encoder(self._encoder, self._knn_data, self._config, self._device)
        return {"eval/knn_top1": results["top1"], "eval/knn5shot_top1": results["5shot"]}
