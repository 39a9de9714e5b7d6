"""What do several sources say together?

HEAR's participants concatenated models: every moment and every clip is described by all of them, one after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from audiossl.features.source import Described, Source
from audiossl.spectrogram import resample, resampled_samples


class SideBySide(nn.Module):
    """Describe clips by several sources at once, as HEAR's concatenated models: features one after the other.

    Of each, the last as many layers as the one with fewest has; moments are those of the source with most, the others'
    nearest in time beside them. A source without class tokens gives the mean of its moments in their place.
    """

    def __init__(self, sources: Sequence[Source]):
        super().__init__()
        self.sources = nn.ModuleList(sources)
        self.name = " + ".join(source.name for source in sources)
        self.rate_hz, self.width = max(s.rate_hz for s in sources), sum(s.width for s in sources)
        self.num_layers = min(source.num_layers for source in sources)
        self.max_seconds = min((s.max_seconds for s in sources if s.max_seconds is not None), default=None)
        self.hash = hashlib.sha256("+".join(source.hash for source in sources).encode()).hexdigest()

    @torch.no_grad()
    def describe(self, waveform: Tensor, num_samples: Tensor) -> Described:
        """Describe clips as `Source` says; each source hears them at its own rate."""
        found = []
        for source in self.sources:
            heard = resample(waveform, self.rate_hz, source.rate_hz)
            counts = resampled_samples(num_samples, self.rate_hz, source.rate_hz)
            if source.max_seconds is not None:  # a sample more than it knows, by rounding
                counts = counts.clamp(max=round(source.max_seconds * source.rate_hz))
            found.append(source.describe(heard, counts))
        finest = max(found, key=lambda part: part.columns.shape[2])
        columns = torch.cat([_nearest(part, finest)[:, -self.num_layers :] for part in found], dim=-1)
        highest = torch.cat([_highest(part)[:, -self.num_layers :] for part in found], dim=-1)
        if all(part.classes is None for part in found):
            return Described(columns, finest.valid, None, highest)
        classes = torch.cat([_class_or_mean(part)[:, -self.num_layers :] for part in found], dim=-1)
        return Described(columns, finest.valid, classes, highest)


def _nearest(part: Described, finest: Described) -> Tensor:
    """Take of `part`'s moments those nearest to `finest`'s, clip by clip: (B, L, T', D)."""
    if part is finest:
        return part.columns
    own, wanted = part.valid.sum(1), finest.valid.sum(1)
    places = torch.arange(finest.valid.shape[1], device=own.device)
    nearest = ((places + 0.5) * (own / wanted.clamp(min=1))[:, None]).long()
    nearest = nearest.minimum((own - 1).clamp(min=0)[:, None])
    sizes = (-1, part.columns.shape[1], -1, part.columns.shape[3])
    return part.columns.gather(2, nearest[:, None, :, None].expand(*sizes))


def _class_or_mean(part: Described) -> Tensor:
    if part.classes is not None:
        return part.classes
    weights = part.valid[:, None, :, None]
    return (part.columns * weights).sum(2) / weights.sum(2).clamp(min=1)


def _highest(part: Described) -> Tensor:
    if part.highest is not None:
        return part.highest
    return part.columns.masked_fill(~part.valid[:, None, :, None], -torch.inf).amax(2)
