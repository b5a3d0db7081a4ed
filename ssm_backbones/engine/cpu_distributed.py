"""Distributed training on CPUs: synchronised batch normalisation, which PyTorch provides for GPUs only."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, distributed, nn


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``SyncBatchNorm`` for CPUs: in training, mean and variance are computed over the samples of all processes.

    Input and output are (B, C) or (B, C, *), of any floating dtype; float16 and bfloat16 are computed in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x. Every process of the group has to call this; batch and map sizes may differ."""
        if not self.training or not distributed.is_initialized():
            return super().forward(x)
        values = x if x.dtype == torch.float64 else x.float()
        dims = [0, *range(2, x.dim())]
        shape = (1, -1) + (1,) * (x.dim() - 2)
        count = values.new_full((1,), x.numel() / x.shape[1])
        total = _SumOverProcesses.apply(torch.cat([values.sum(dims), count]))
        count = total[-1].detach()
        if count <= 1:
            raise ValueError(f'batch normalisation needs more than one value per channel in training, got {x.shape}.')
        mean = total[:-1] / count
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / count
        self._update_running_statistics(mean.detach(), variance.detach() * count / (count - 1))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f'expected (B, C) or (B, C, *), got {tuple(x.shape)}.')


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Each process's loss depends on the values of all processes.
        total = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's ``MMDistributedDataParallel`` for CPUs, with every unsupported ``SyncBatchNorm`` replaced."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(module=share_batch_norms(module), **kwargs)


def share_batch_norms(module: nn.Module) -> nn.Module:
    """Replace every ``SyncBatchNorm`` of PyTorch or mmcv by a :class:`SharedBatchNorm` with the same tensors."""
    if type(module).__name__ == 'SyncBatchNorm':
        layer: Any = module
        shared = SharedBatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            setattr(shared, name, tensor)
        return shared.train(module.training)
    for name, child in module.named_children():
        replaced = share_batch_norms(child)
        if replaced is not child:
            setattr(module, name, replaced)
    return module
