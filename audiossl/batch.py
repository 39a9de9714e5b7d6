"""What travels from the loader to a method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from audiossl.stepping.hostcopy import send_beside


class Skipped(NamedTuple):
    """Name a clip that could not be read, and its row of the global batch."""

    key: str
    shard: str
    reason: str
    row: int


@dataclass
class Batch:
    """Hold B clips of one micro-batch.

    `rows` are the clips' positions within the optimiser step's *global* batch (all ranks and micro-batches): noise is
    drawn for the global batch and each clip takes its row, so it does not matter who computes it. A clip that could not
    be read is left out, which is why rows may have gaps.
    """

    waveform: Tensor | None = None  # (B, S) float in [-1, 1], or int16 as the loader delivers it
    num_samples: Tensor | None = None  # (B,) int64, samples before any padding
    spectrogram: Tensor | None = None  # (B, 1, F, T), for a caller who has no waveform
    rows: Tensor | None = None  # (B,) int64
    key: list[str] = field(default_factory=list)
    target: Tensor | None = None  # (B, C) float32, 1 for each of a clip's labels; only where the method needs them
    skipped: list[Skipped] = field(default_factory=list)  # the clips left out
    frame_target: Tensor | None = (
        None  # (B, T', C) float32 in [0, 1], NaN where nobody knows; a row a column of patches
    )
    start_seconds: Tensor | None = None  # (B,) float64, where in its clip the crop begins; NaN: the clip is repeated

    def __len__(self) -> int:
        first = self.waveform if self.waveform is not None else self.spectrogram
        return 0 if first is None else len(first)

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor, to a GPU without waiting; but `start_seconds`, which is for the host to look at."""
        device, own = torch.device(device), {n: v for n, v in vars(self).items() if isinstance(v, Tensor)}
        own.pop("start_seconds", None)
        from_host = {n: v for n, v in own.items() if v.device.type == "cpu"}
        moved = {n: v.to(device) for n, v in own.items() if n not in from_host}
        return replace(self, **moved, **send_beside(from_host, device))

    def pin_memory(self) -> Batch:
        """Pin every tensor, as a `DataLoader` with `pin_memory` asks."""
        return replace(self, **{n: v.pin_memory() for n, v in vars(self).items() if isinstance(v, Tensor)})


def multi_hot(labels: Sequence[Iterable[int]], num_classes: int) -> Tensor:
    """Turn the label ids of B clips into targets: (B, num_classes) float32, 1 for each label of a clip, else 0."""
    target = torch.zeros(len(labels), num_classes)
    for row, ids in zip(target, labels, strict=True):
        row[list(ids)] = 1
    return target
