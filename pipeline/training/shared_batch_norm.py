"""BatchNorm that computes on several ranks what it computes on one: with the statistics of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def share_batch_statistics(network: nn.Module, ranks: int, device: torch.device) -> nn.Module:
    """The network, in which every BatchNorm layer in training sees the batch of all `ranks`: by torch's SyncBatchNorm
    on CUDA, on the CPU by SharedBatchNorm. The parameters and buffers stay the same tensors, with the same names."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # torch's own would drop the activations inside timm's layers

        converted: nn.Module = convert_sync_batchnorm(network)
        return converted
    for name, layer in list(network.named_modules()):
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SharedBatchNorm):
            network.set_submodule(name, SharedBatchNorm(layer, ranks))
    return network


class SharedBatchNorm(_BatchNorm):
    """`layer` with the mean and variance of the whole batch on all ranks, which torch has for GPUs only."""

    def __init__(self, layer: _BatchNorm, ranks: int) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self._parameters, self._buffers, self._modules = layer._parameters, layer._buffers, layer._modules
        self._ranks = ranks
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.running_mean is None:
            y = self._normalized(x)
        else:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        for layer in self.children():  # dropout and activation of timm's layers, in this order
            y = layer(y)
        return y

    def _normalized(self, x: Tensor) -> Tensor:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        dimensions = [0, *range(2, x.ndim)]
        shape = [-1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * self._ranks
        mean = all_reduce(values.sum(dimensions)) / count
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().sum(dimensions)) / count
        if self.training and self.track_running_stats:
            self._update_statistics(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)
