"""How do numbers get from one memory to the other while neither side waits?

By copies through pinned memory, which the device makes when it comes to them. A number that is read a step later, or
after much other work has been queued behind it, has long arrived by then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """Copy tensors to the host's memory without waiting, as they are now; `read` waits until they are there."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._event: torch.cuda.Event | None = None
        self._tensors = [self._copy(tensor.detach()) for tensor in tensors]
        if any(tensor.is_cuda for tensor in tensors):
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Tensor]:
        """Give the copies, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors

    @staticmethod
    def _copy(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True)
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor of the host to a device without waiting."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
