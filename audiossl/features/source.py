"""What does everything that describes a clip have in common?

Waveform in, every layer's features of every moment out: so an encoder of ours, a model of others and the statistics of
the log-mel can be judged by the same heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Described(NamedTuple):
    """Hold what a source says of B clips: every layer's features of every moment, and the clips' class tokens."""

    columns: Tensor  # (B, L, T', D) float32
    valid: Tensor  # (B, T') bool: which moments are audio, not padding
    classes: Tensor | None  # (B, L, D): the class tokens, averaged; None where there are none
    highest: Tensor | None = None  # (B, L, D): the maximum over patches that are audio; None: over the moments


@runtime_checkable
class Source(Protocol):
    """Describe clips: frozen, in evaluation mode, no gradient, on the device that `to` names.

    `hash` (hex) changes with any weight, the front end and any setting that changes features. `num_layers` is L,
    `width` D; `max_seconds` is the longest clip of one `describe`, None for any.
    """

    name: str
    hash: str
    rate_hz: int
    num_layers: int
    width: int
    max_seconds: float | None

    def describe(self, waveform: Tensor, num_samples: Tensor) -> Described:
        """Describe (B, S) float in [-1, 1] at `rate_hz`, of which `num_samples` (B,) int64 are audio."""
        ...

    def to(self, device: torch.device | str) -> Source:
        """Move to a device, and return itself."""
        ...


def hash_of_weights(module: nn.Module | None, about: Sequence[object]) -> str:
    """Hash every tensor of a module (none: nothing), and plain values that say how it is used: hexadecimal."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items() if module is not None else ()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
