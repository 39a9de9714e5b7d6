"""How does a waveform reach the rate and the number format a front end wants?

Clips arrive as int16 at the rate they were packed with; both conversions happen on the device, where they are cheap.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torchaudio.transforms import Resample


def to_float(waveform: Tensor) -> Tensor:
    """Convert to float32 in [-1, 1]: int16, as the loader delivers it, is divided by 32768."""
    if waveform.dtype == torch.int16:
        return waveform.float() / 32768
    assert waveform.is_floating_point(), f"a waveform is float or int16, not {waveform.dtype}"
    return waveform.float()


@lru_cache(maxsize=32)
def resampler(from_hz: int, to_hz: int, device: torch.device) -> Resample:
    """Build the windowed-sinc filter once per pair of rates and device."""
    with torch.inference_mode(False):  # a filter born in inference mode could never serve training
        return Resample(from_hz, to_hz).to(device)


def resample(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Resample (B, S) float or int16 on its device to (B, ceil(S * to_hz / from_hz)) float32, differentiably."""
    waveform = to_float(waveform)
    if from_hz == to_hz:
        return waveform
    if not len(waveform):  # torchaudio cannot reshape nothing
        return waveform.new_zeros(0, resampled_samples(waveform.shape[-1], from_hz, to_hz))
    with torch.autocast(waveform.device.type, enabled=False):
        return resampler(from_hz, to_hz, waveform.device)(waveform)


def resampled_samples(num_samples: Tensor | int, from_hz: int, to_hz: int) -> Tensor | int:
    """Count the samples `resample` makes of `num_samples`."""
    return -(-num_samples * to_hz // from_hz)
