"""What do all ranks of a run know together?

A signal reaches one rank, a clock differs on another: whoever acts alone leaves the others waiting for ever. Each
decision is therefore reduced over the ranks, on the CPU, so that asking after every step does not make the host wait
for the GPU.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


def sum_of_all_ranks(count: int | Tensor, device: torch.device) -> Tensor:
    """Add up a number over all ranks: a float32 scalar on `device`. All ranks must call it equally often."""
    if isinstance(count, Tensor):
        total = count.detach().to(device, torch.float32, copy=True)
    else:
        total = torch.full((), float(count), device=device)  # filled there: a copy would make the host wait
    if _size() > 1:
        dist.all_reduce(total)
    return total


def mean_of_all_ranks(values: Tensor, total: Tensor | None = None) -> Tensor:
    """Average (n,) over the rows of all ranks, which may hold different numbers of them, none included: a scalar.

    Each rank gets its rows' sum, scaled so that the mean over the ranks, which is what DistributedDataParallel takes of
    the gradients and our logs of the values, is the mean over all rows. All ranks must call it equally often. `total`
    is the number of all ranks' rows where it is known already.
    """
    total = sum_of_all_ranks(len(values), values.device) if total is None else total
    return values.sum() * (_size() / total.clamp(min=1))


def _size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Tell whether this process is alone, or the one that writes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


_patience: timedelta | None = None  # of groups that are made later; None: torch's own
_day_long: tuple[Any, Any] = (None, None)  # the ranks, and their group that waits for a day


def give_up_after(patience: timedelta) -> None:
    """Set how long these ranks wait for one another from now on, in groups made later too."""
    global _patience
    _patience = patience
    # under its public name in newer ones of torch
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(patience)


@contextmanager
def others_wait() -> Iterator[None]:
    """Let the other ranks wait until the first has done what stands inside, for a day if need be.

    All ranks enter at the same moment. Where the first fails, the others do, as they lose the connection.
    """
    global _day_long
    if _size() == 1:
        yield
        return
    if _day_long[0] is not dist.group.WORLD:
        _day_long = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(days=1)))
    faulthandler.cancel_dump_traceback_later()  # that of `LastWords`, which the next batch sets again
    yield
    dist.barrier(_day_long[1])


class Ranks:
    """Reduce small values over all ranks; make it on all ranks at the same moment, after the process group exists."""

    def __init__(self):
        self.size = _size()
        is_gpu_group = self.size > 1 and dist.get_backend() != "gloo"
        self._group = dist.new_group(backend="gloo", timeout=_patience) if is_gpu_group else None

    def maximum(self, value: int) -> int:
        """Give the greatest `value` of all ranks."""
        if self.size == 1:
            return int(value)
        reduced = torch.tensor(int(value), dtype=torch.int64)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=self._group)
        return int(reduced)

    def mean(self, values: list[Any]) -> list[float]:
        """Give the mean over the ranks of each of `values` (numbers or one-value tensors)."""
        reduced = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(reduced, group=self._group)
        return (reduced / self.size).tolist()

    def total(self, values: NDArray) -> NDArray:
        """Add up the arrays of all ranks, number by number."""
        if self.size == 1:
            return values
        reduced = torch.from_numpy(np.ascontiguousarray(values))
        dist.all_reduce(reduced, group=self._group)
        return reduced.numpy()

    def gather(self, value: Any) -> list[Any]:
        """Give the `value` of every rank, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values
