"""How does batch normalisation see one batch when several processes hold its parts?

By adding up sums over all ranks, and letting gradients take the same way back. torch's SyncBatchNorm does so on GPUs
and refuses the CPU; this one works wherever `torch.distributed` does. Gradient accumulation stays apart: each
micro-batch is normalised by itself, so 8 x 2 accumulated clips do not equal 1 x 16.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """Add a tensor up over all ranks; backwards, the gradients of all ranks' sums."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        if _is_distributed():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient)


class BatchNorm1d(nn.BatchNorm1d):
    """Normalise (R, C) or (R, C, L) as `torch.nn.BatchNorm1d` does, in training by the statistics of all ranks.

    The state dict is torch's, and on one process so is the arithmetic; but where torch refuses a single row, or none,
    it gives its bias, or nothing. Ranks may hold different numbers of rows, none
    included, but all must call it, and its backward, equally often. A gradient that reaches the input is that of the
    sum of all ranks' losses. The running variance is unbiased over the rows of all ranks.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True):
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)

    def forward(self, values: Tensor) -> Tensor:
        """Normalise per channel: same shape and dtype out."""
        if not self.training or (len(values) > 1 and not _is_distributed()):
            return super().forward(values)
        self._check_input_dim(values)
        with torch.autocast(values.device.type, enabled=False):
            return self._normalise(values).to(values.dtype)

    def _normalise(self, values: Tensor) -> Tensor:
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        axes, shape = ([0], (1, -1)) if values.ndim == 2 else ([0, 2], (1, -1, 1))
        rows = values.new_full((1,), values.numel() // values.shape[1])
        summed = _SumOverRanks.apply(torch.cat([values.sum(axes), rows]))
        count = summed[-1:].detach()
        mean = summed[:-1] / count.clamp(min=1)
        centred = values - mean.view(shape)
        squares = _SumOverRanks.apply(centred.square().sum(axes))  # a pass of its own, as in torch: nothing cancels
        variance = squares / count.clamp(min=1)
        self._remember(mean.detach(), variance.detach(), count)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        return torch.addcmul(self.bias.view(shape), normalised, self.weight.view(shape)) if self.affine else normalised

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics, or leave them where no rank has a row."""
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), self.momentum * (count > 0).to(running.dtype))
        self.num_batches_tracked.add_(1)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
