"""Do the features still tell clips apart, or has training collapsed?

A student that copies its own teacher can reach loss 0 by saying the same of every clip. Two numbers show it. The std of
L2-normalised features is 1 / sqrt(dim) where they point everywhere and falls to 0 where they agree (SimSiam,
2011.10566). The effective rank (Roy and Vetterli 2007) counts the directions in use: features that still vary, but
along one line, have a healthy std and rank 1.

Both look at the rows of all ranks. So in a distributed run every rank has to call them equally often: in training,
where ranks run in step, not in validation, where one may have a batch more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

VARIANCE_FLOOR = 1e-6  # published: a std is .001 at least


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Average over dimensions the std of L2-normalised rows: (..., D) -> scalar float32, .001 where all rows agree.

    Per dimension sqrt(variance + 1e-6), with the unbiased variance over all ranks' rows. Healthy: near 1 / sqrt(D).
    Source: the diagnostics of ATST's code, of the teacher's projector and the student's predictor.
    """
    rows = F.normalize(features.detach().float().flatten(0, -2), dim=-1)
    count, centred = _centre(rows)
    variance = _over_ranks(centred.square().sum(0)) / (count - 1).clamp(min=1)
    return (variance + VARIANCE_FLOOR).sqrt().mean()


@dataclass
class Spectrum:
    """Hold what the effective rank is computed from: `gram` (n, n) float32, whose eigenvalues below `floor` () are 0.

    Eigenvalues make the host wait for a GPU. So a method logs the spectrum, and the trainer computes its `rank` from a
    copy, when the host has it.
    """

    gram: Tensor
    floor: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, features: Tensor) -> Spectrum:
        """Take the rows (..., D) of all ranks: in float32, also under autocast, and NaN as 0."""
        rows = features.detach().float().flatten(0, -2).nan_to_num(0.0, 0.0, 0.0)
        _, centred = _centre(rows)
        with torch.autocast(rows.device.type, enabled=False):
            is_tall = _is_distributed() or rows.shape[0] > rows.shape[1]  # the smaller product has the same spectrum
            gram = _over_ranks(centred.T @ centred) if is_tall else centred @ centred.T
        epsilon = torch.finfo(torch.float32).eps
        return cls(gram, 4 * epsilon * gram.trace() + 100 * epsilon**2 * _over_ranks(rows.square().sum()))

    @torch.no_grad()
    def rank(self) -> Tensor:
        """Count the directions in use: scalar float32, see `effective_rank`."""
        squares = torch.linalg.eigvalsh(self.gram)
        values = torch.where(squares > self.floor, squares, 0.0).sqrt()
        total = values.sum()
        entropy = torch.special.entr(values / total.clamp(min=torch.finfo(torch.float32).tiny)).sum()
        return entropy.exp() * (total > 0)


def effective_rank(features: Tensor) -> Tensor:
    """Count the directions that the rows use: (..., D) -> scalar float32, from 0 (all agree, or no row) to D.

    exp of the entropy of the centred features' singular values, normalised to sum 1, over the rows of all ranks. In
    float32, also under autocast; values below what float32 can tell from rounding count as 0, and NaN as 0.
    """
    return Spectrum.of(features).rank()


def _centre(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give the number of all ranks' rows, and this rank's without the mean of them all."""
    totals = _over_ranks(torch.cat([rows.sum(0), rows.new_full((1,), rows.shape[0])]))
    count = totals[-1]
    return count, rows - totals[:-1] / count.clamp(min=1)


def _over_ranks(tensor: Tensor) -> Tensor:
    if _is_distributed():
        dist.all_reduce(tensor)
    return tensor


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
