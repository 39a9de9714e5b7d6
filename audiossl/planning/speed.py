"""How many clips a second does a device train on?

Where the devices are here, ten steps are measured, reading included. Where they are not, it is arithmetic: the peak
that a device is said to have, times the share of it that training is said to reach (MFU), over the operations a clip.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from audiossl.noise import Noise
from audiossl.optim import OptimSettings, build_optimizer
from audiossl.pretraining import prepare
from audiossl.shards import ShardData

STEPS, WARM_UP, PATIENCE_SECONDS = 10, 1, 20.0
DECODED_CLIPS = 32


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Say what is taken for granted of devices that are not here: the section `assume`.

    - peak_tflops: of a device in 16-bit arithmetic, in 10^12 a second; peak_tflops_32: in float32.
    - mfu: the share of that which the model's own operations reach.
    - memory_gb: of a device, in 10^9 bytes.
    - gpus_per_node: of a cluster's nodes.
    - clips: of an epoch, for a corpus that is not here; null: those of data.shards.
    """

    peak_tflops: float
    peak_tflops_32: float
    mfu: float
    memory_gb: float
    gpus_per_node: int
    clips: int | None

    def clips_per_second(self, flops_per_clip: int, precision: str) -> float:
        """Estimate what one device trains on."""
        return self.peak(precision) * 1e12 * self.mfu / flops_per_clip

    def peak(self, precision: str) -> float:
        """Give the peak at a precision of Lightning's ("bf16-mixed", "32-true")."""
        return self.peak_tflops if "16" in precision else self.peak_tflops_32


def measure(
    method: nn.Module,
    data: ShardData,
    optim: Mapping[str, Any],
    *,
    device: torch.device,
    half: torch.dtype | None,
    crop_samples: int,
    seed: int,
) -> tuple[float, int]:
    """Train on one device for ten steps of the run's own batches, or as many as 20 s allow: (clips/s, steps).

    Weights move; the caller throws them away. The first step only warms up, unless it alone takes that long.
    """
    method.to(device).train()
    optimizer = build_optimizer(method, OptimSettings(**{**optim, **STEADY}), lr=1e-6)
    last = WARM_UP + STEPS
    how = dict(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=last, seed=seed)
    loader, seconds, clips = data.train_loader(**how, crop_samples=crop_samples, is_replay=True), [], []
    begin = time.perf_counter()
    for step, batch in enumerate(islice(loader, last)):
        batch = prepare(batch.to(device), method.frontend, data.rate_hz)
        with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
            loss = method(batch, generator=Noise(seed, step, batch.rows, data.batch_size, device))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
        clips.append(len(batch))
        if sum(seconds) > PATIENCE_SECONDS:
            break
        begin = time.perf_counter()
    first = WARM_UP if len(seconds) > WARM_UP else 0
    return sum(clips[first:]) / sum(seconds[first:]), len(seconds) - first


STEADY = dict(  # the rate is given by hand; only the kind of optimiser and its state matter here
    schedule="warmup_cosine", ramp_down=None, warmup_steps=0, warmup_epochs=None, warmup_ratio=None, layer_decay=None
)


def decoding_rate(data: ShardData, *, crop_samples: int, seed: int) -> float:
    """Measure how many clips a second one process reads and decodes here, without workers."""
    alone = copy.copy(data)
    alone.num_workers, alone.batch_size, alone.cache_bytes = 0, DECODED_CLIPS // 4, 0
    how = dict(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=4, seed=seed)
    batches = iter(alone.train_loader(**how, crop_samples=crop_samples, is_replay=True))
    next(batches)  # opens the files, imports the decoder
    begin = time.perf_counter()
    return sum(len(batch) for batch in batches) / (time.perf_counter() - begin)
