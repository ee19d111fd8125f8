"""k-NN of encoders while they are trained: snapshots of weights in, accuracies out. Knows neither Ray nor the trainer."""

import dataclasses

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import CheckpointError, first_line
from hvp_ray.evaluation.report import KnnData, evaluate_encoder, load_knn_data
from hvp_ray.methods.backbones import build_backbone


def snapshot_encoder(encoder: nn.Module) -> bytes:
    """Return the weights of an encoder as safetensors."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()})


class SnapshotKnn:
    """Evaluates snapshots of one run; images are read and cut once, at the first one.

    `fingerprint` and `test_data` are those of the run: see `open_dataset`.
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
        """Return knn_top1 and knn5shot_top1 of a snapshot; nothing where the data has no labels or no test images.

        Raises:
            CheckpointError: no snapshot, or one of another encoder.
            DataError: the images are others than when the run was prepared.
        """
        if self._encoder is None:
            dataset = open_dataset(self._config.data, fingerprint=self._fingerprint, test_data=self._test_data)
            self._knn_data = load_knn_data(self._config, dataset)
            settings = dataclasses.replace(self._config.method.backbone, pretrained=False)
            self._encoder = build_backbone(settings, drop_path=0.0).to(self._device)
        if self._knn_data is None:
            return {}
        try:
            self._encoder.load_state_dict(load(snapshot))
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"a snapshot for the k-NN during training holds no weights of this encoder ({first_line(error)}); delete "
                f"the folder knn_pending of the run to go on without what is in it"
            ) from error
        results = evaluate_encoder(self._encoder, self._knn_data, self._config, self._device)
        return {"eval/knn_top1": results["top1"], "eval/knn5shot_top1": results["5shot"]}
