"""Which stretches of a clip does a source hear, and what is kept of each?

A clip is cut into segments as long as the temporal support (2312.14005), or as the source knows; of each, every layer
is pooled over its moments, and the moments themselves are kept where a head wants them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiossl.features.source import Described, Source
from audiossl.probes.sources import device_of

SHORTEST_REST = 0.05  # of a segment: a rest shorter than that is left out


@dataclass(frozen=True)
class Segment:
    """Say where a segment of a clip lies, in samples, and from which sample on its moments are not yet described."""

    start: int
    stop: int
    new_from: int


@dataclass(frozen=True)
class Heard:
    """Hold what is kept of a segment: poolings (L, P, D), moments (T', L, D) or None, their middles in seconds."""

    pooled: NDArray[np.float32]
    moments: NDArray[np.float32] | None
    middles_seconds: NDArray[np.float32] | None


@dataclass(frozen=True)
class Wanted:
    """Say what is kept: segments of `support_seconds` (None: as the source knows), the last `layers` (None: all)
    pooled, and, `with_moments`, every moment of the last `moment_layers` of them.
    """

    support_seconds: float | None = None
    with_moments: bool = False
    layers: int | None = None
    moment_layers: int | None = None


def segments_of(num_samples: int, length: int | None) -> list[Segment]:
    """Cut a clip into segments of `length` samples (None: one); the last begins earlier, so that it is all audio.

    A rest shorter than a twentieth of a segment is left out. A clip shorter than a segment is one, as it is.
    """
    if length is None or num_samples <= length:
        return [Segment(0, num_samples, 0)]
    starts = range(0, num_samples - length + 1, length)
    found = [Segment(start, start + length, start) for start in starts]
    rest = num_samples - found[-1].stop
    if rest > SHORTEST_REST * length:
        found.append(Segment(num_samples - length, num_samples, found[-1].stop))
    return found


def segment_samples(source: Source, support_seconds: float | None) -> int | None:
    """Count the samples of a segment: the support, no longer than what the source knows; None for whole clips."""
    limits = [seconds for seconds in (source.max_seconds, support_seconds) if seconds is not None]
    if not limits:
        return None
    return max(1, int(min(limits) * source.rate_hz + 1e-6))


def hear(source: Source, waveform: NDArray[np.float32], segments: list[Segment], wanted: Wanted) -> list[Heard]:
    """Describe segments of a clip (S,), or of several laid one after the other, and keep what is `wanted`.

    A moment is at the middle of its share of the segment, or of the source's own `column_seconds`.
    """
    device = device_of(source)
    pieces = [torch.from_numpy(np.ascontiguousarray(waveform[some.start : some.stop])) for some in segments]
    num_samples = torch.tensor([len(piece) for piece in pieces])
    found = source.describe(pad_sequence(pieces, batch_first=True).to(device), num_samples.to(device))
    if wanted.layers is not None:
        classes = None if found.classes is None else found.classes[:, -wanted.layers :]
        highest = None if found.highest is None else found.highest[:, -wanted.layers :]
        found = Described(found.columns[:, -wanted.layers :], found.valid, classes, highest)
    pooled = pool(found).cpu().numpy()
    if not wanted.with_moments:
        return [Heard(row, None, None) for row in pooled]
    columns = found.columns[:, -(wanted.moment_layers or found.columns.shape[1]) :].transpose(1, 2).cpu()
    counts = found.valid.sum(1).tolist()
    rows = []
    for row, (some, count) in enumerate(zip(segments, counts, strict=True)):
        seconds = (some.stop - some.start) / source.rate_hz
        step = getattr(source, "column_seconds", None) or seconds / max(count, 1)
        middles = (np.arange(count) + 0.5) * step
        is_new = middles >= (some.new_from - some.start) / source.rate_hz
        rows.append(Heard(pooled[row], columns[row, :count][torch.from_numpy(is_new)].numpy(), middles[is_new]))
    return rows


def pool(found: Described) -> Tensor:
    """Pool what is audio: mean of the moments, maximum of the patches, class token where there is one: (B, L, P, D)."""
    weights = found.valid[:, None, :, None]
    mean = (found.columns * weights).sum(2) / weights.sum(2).clamp(min=1)
    highest = found.columns.masked_fill(~weights, -torch.inf).amax(2) if found.highest is None else found.highest
    parts = [mean, torch.where(highest.isinf(), 0.0, highest)]
    return torch.stack(parts + ([] if found.classes is None else [found.classes]), dim=2)


POOLED = ("mean", "max", "class")  # the order along P
