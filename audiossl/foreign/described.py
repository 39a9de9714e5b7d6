"""How is padding kept out of what a model of others gives?

Convolutions and normalisations over time hear the padding of a batch
where no mask can hide it; there, only clips of one length share a pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from audiossl.features.source import Described


def clips_of(waveform: Tensor, num_samples: Tensor, shortest: int) -> list[Tensor]:
    """Take the clips (S_i,) out of a batch (B, S); zeros follow those shorter than `shortest` samples."""
    counts = num_samples.clamp(0, waveform.shape[1]).tolist()
    clips = [row[:count].float() for row, count in zip(waveform, counts, strict=True)]
    return [functional.pad(clip, (0, max(shortest - len(clip), 0))) for clip in clips]


def first(counts: Sequence[int], device: torch.device, length: int | None = None) -> Tensor:
    """Mark the first counts[i] of `length` places (None: the largest count): (B, length) bool."""
    length = max(counts, default=0) if length is None else length
    return torch.arange(length, device=device) < torch.tensor(counts, device=device, dtype=torch.long)[:, None]


def by_length(clips: Sequence[Tensor], describe: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> Described:
    """Describe clips (S_i,) of one length together, those of another length in another pass.

    `describe` turns waveforms (b, S) into columns (b, L, T', D) and classes (b, L, D) or None.
    """
    assert clips, "an empty batch"
    groups = defaultdict(list)
    for row, clip in enumerate(clips):
        groups[len(clip)].append(row)
    columns: list[Tensor] = [torch.empty(0)] * len(clips)
    classes: list[Tensor] = [torch.empty(0)] * len(clips)
    has_classes = False
    for rows in groups.values():
        found, tokens = describe(torch.stack([clips[row] for row in rows]))
        for place, row in enumerate(rows):
            columns[row] = found[place].transpose(0, 1)  # (T', L, D): `pad_sequence` pads the first axis
            if tokens is not None:
                classes[row], has_classes = tokens[place], True
    valid = first([len(some) for some in columns], columns[0].device)
    padded = nn.utils.rnn.pad_sequence(columns, batch_first=True).transpose(1, 2)
    return Described(padded, valid, torch.stack(classes) if has_classes else None)
