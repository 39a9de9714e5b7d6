"""How do numbers get from one memory to the other while neither side waits?

By copies through pinned memory, which the device makes when it comes to them. A number that is read a step later, or
after much other work has been queued behind it, has long arrived by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

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


def send_beside(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move tensors of the host to a device without waiting; to a GPU beside what it computes, if they are pinned.

    The copies have a stream of their own, so that those of the next step run during this one; the stream of now waits
    for them, on the device.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    now, copies = torch.cuda.current_stream(device), _stream_for_copies(device)
    with torch.cuda.stream(copies):
        sent = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    now.wait_stream(copies)
    for tensor in sent.values():
        tensor.record_stream(now)  # else the copies' stream might use its memory again before `now` is done with it
    return sent


@cache
def _stream_for_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
