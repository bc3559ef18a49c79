"""Batch normalisation over the whole batch, also where several workers hold parts of it."""

from typing import Any

import torch
from torch import Tensor, distributed, nn


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d and 2d whose statistics are those of all workers' rows together, on any device (torch's SyncBatchNorm
    is for GPUs alone). The workers have equal shares of the batch."""

    def forward(self, values: Tensor) -> Tensor:
        """`[b d]` or `[b d h w]` -> the same shape."""
        if not (self.training and distributed.is_initialized() and distributed.get_world_size() > 1):
            return super().forward(values)
        axes = [axis for axis in range(values.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(values.ndim)]
        count = values.numel() // values.shape[1] * distributed.get_world_size()
        mean = _Sum.apply(values.float().sum(axes)) / count
        centred = values.float() - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        self._note(mean, variance * count / (count - 1))
        found = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            found = found * self.weight.view(shape) + self.bias.view(shape)
        return found.to(values.dtype)

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the statistics that are used in evaluation."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)

    def _check_input_dim(self, values: Tensor) -> None:
        if values.ndim not in (2, 4):
            raise ValueError(f"needs [b d] or [b d h w], not {list(values.shape)}")


class _Sum(torch.autograd.Function):
    """The sum over all workers; gradients are summed on their way back."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        values = values.clone()
        distributed.all_reduce(values)
        return values

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient
