"""BatchNorm over all ranks on a CPU: torch's SyncBatchNorm refuses CPU tensors.

Same statistics as one process with the whole batch, up to summation order. All ranks must have the same number of
images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvp_ray.distributed.world import all_reduce_sum
from hvp_ray.errors import ConfigError


class CpuSyncBatchNorm(_BatchNorm):
    """BatchNorm for [N, C] or [N, C, H, W] whose batch statistics are those of all ranks."""

    num_ranks: int = 1

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise. In training mode, update running statistics if they are tracked."""
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = input.numel() // input.shape[1] * self.num_ranks
        values = input.float()
        mean = all_reduce_sum(values.sum(dim=axes)) / count
        centred = values - mean.view(shape)
        variance = all_reduce_sum(centred.square().sum(dim=axes)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._move_running_statistics(mean.detach(), variance.detach(), count)
        normalised = (centred * (variance + self.eps).rsqrt().view(shape)).to(input.dtype)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised

    def _move_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if self.momentum is None:
            raise ConfigError("CpuSyncBatchNorm needs a momentum; cumulative averages are not supported")
        self.num_batches_tracked.add_(1)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)


def convert_to_cpu_sync_batch_norm(module: nn.Module, num_ranks: int) -> nn.Module:
    """Replace every BatchNorm of `module` in place, keeping parameters and buffers; return `module`.

    Raises:
        ConfigError: a BatchNorm of a kind that cannot be replaced without changing what it computes.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            synced = CpuSyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            synced.num_ranks = num_ranks
            synced.load_state_dict(child.state_dict())
            for parameter, original in zip(synced.parameters(), child.parameters(), strict=True):
                parameter.requires_grad_(original.requires_grad)  # a teacher's stay frozen
            synced.train(child.training)
            setattr(module, name, synced)
        elif isinstance(child, _BatchNorm):
            raise ConfigError(
                f"{type(child).__name__} ({name}) cannot be synchronized on a CPU; use one trainer or GPUs"
            )
        else:
            convert_to_cpu_sync_batch_norm(child, num_ranks)
    return module
