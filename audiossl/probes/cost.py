"""What does it cost to describe a clip: how many operations, and how many clips a second?"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from audiossl.features.source import Source
from audiossl.probes.segments import segment_samples, segments_of
from audiossl.probes.sources import device_of

WARM_UP, MIN_SECONDS, MAX_ROUNDS = 1, 1.0, 50


class Cost(NamedTuple):
    """Hold what a clip costs: `gflops` of its segments together (a multiply-add is 2), and clips described a second."""

    gflops: float
    clips_per_second: float
    segments: int
    segment_seconds: float


@torch.no_grad()
def cost_of(source: Source, clip_seconds: float, support_seconds: float | None, batch_size: int) -> Cost:
    """Measure a source on noise as long as a clip, cut as `segments.py` cuts it; no decoding, no reading.

    Operations are those of matrix products and convolutions (torch's counter; an FFT counts nothing).
    """
    samples = max(1, round(clip_seconds * source.rate_hz))
    segments = segments_of(samples, segment_samples(source, support_seconds))
    length = max(some.stop - some.start for some in segments)
    device = device_of(source)
    one_clip = 0.1 * torch.randn(len(segments), length, generator=torch.Generator().manual_seed(0)).to(device)
    counts = torch.full((len(segments),), length, device=device)
    with FlopCounterMode(display=False) as counter:
        source.describe(one_clip, counts)
    clips = max(1, batch_size // len(segments))
    batch, batch_counts = one_clip.repeat(clips, 1), counts.repeat(clips)
    rounds: list[float] = []
    for number in range(WARM_UP + MAX_ROUNDS):
        begin = time.perf_counter()
        source.describe(batch, batch_counts)[0].flatten()[:1].cpu()  # waits for the device
        if number >= WARM_UP:
            rounds.append(time.perf_counter() - begin)
        if sum(rounds) >= MIN_SECONDS:
            break
    speed = clips / min(rounds)  # the fastest: what else runs on the machine makes the others slower
    return Cost(counter.get_total_flops() / 1e9, speed, len(segments), length / source.rate_hz)
