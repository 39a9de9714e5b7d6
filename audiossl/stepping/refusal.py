"""How is an update kept from the weights when nobody has looked yet whether it is finite?

The device decides: torch's fused AdamW leaves everything as it is, its count of steps included, where it is told that
infinities were found, as a gradient scaler tells it. A moving average of the weights is told the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_REFUSED: ContextVar[Tensor | None] = ContextVar("1 where the step just done was refused, 0 elsewhere", default=None)


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimiser leaves an update out when the device says so."""
    return isinstance(optimizer, torch.optim.AdamW) and all(group.get("fused") for group in optimizer.param_groups)


def skip_unless_finite(optimizer: torch.optim.Optimizer, *numbers: Tensor) -> Tensor:
    """Let the optimiser leave its next update out unless all `numbers` are finite; gives () float32, 1 for left out."""
    refused = torch.stack([number.isfinite() for number in numbers]).all().logical_not().float()
    optimizer.grad_scale, optimizer.found_inf = None, refused
    return refused


@contextmanager
def step_done(refused: Tensor | None) -> Iterator[None]:
    """Tell those who follow the weights, inside, whether they were `refused`; None: it was looked at, they were not."""
    token = _REFUSED.set(refused)
    try:
        yield
    finally:
        _REFUSED.reset(token)


def refused_step() -> Tensor | None:
    """Give () float32 on the device, 1 where the step just done was refused; None where nothing is in doubt."""
    return _REFUSED.get()
