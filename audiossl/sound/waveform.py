"""How does a waveform reach the rate and the number format a front end wants?

Clips arrive as int16 at the rate they were packed with; both conversions happen on the device, where they are cheap. A
recording too long for it is resampled a block at a time, to the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import soxr
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.transforms import Resample

# resampy's "kaiser_best". torchaudio's own default leaves images above the old Nyquist frequency that a log-mel sees:
# an 8 kHz clip packed at 32 kHz (by soxr) and the same clip from its file were .8 of the clips' spread apart; so, .06
FILTER = dict(
    resampling_method="sinc_interp_kaiser",
    lowpass_filter_width=64,
    rolloff=0.9475937167399596,
    beta=14.769656459379492,
)
_CHANNELS = 16  # new samples a stride, at least
_BLOCK_SAMPLES = 2**20  # resampled at a time
_FILTER_VALUES = 2**24  # of a filter for rates with hardly a common divisor: 22254 to 16000 Hz takes 89 million


def to_float(waveform: Tensor) -> Tensor:
    """Convert to float32 in [-1, 1]: int16, as the loader delivers it, is divided by 32768."""
    if waveform.dtype == torch.int16:
        return waveform.float() / 32768
    assert waveform.is_floating_point(), f"a waveform is float or int16, not {waveform.dtype}"
    return waveform.float()


class Resampler(nn.Module):
    """Resample (B, S) float32 by torchaudio's windowed-sinc filter, several of its periods at a time.

    torchaudio computes one period a stride: for 32 to 16 kHz a convolution with a single channel, which nobody computes
    fast. Here a stride makes at least 16 samples, by the same filter shifted: the same numbers to rounding, many times
    as fast (`python -m benchmarks.frontend`). A period needs `width` samples on either side of its own.
    """

    def __init__(self, from_hz: int, to_hz: int):
        super().__init__()
        published = Resample(from_hz, to_hz, **FILTER)
        common = math.gcd(from_hz, to_hz)
        self.width, self.period, self.new_period = published.width, from_hz // common, to_hz // common
        self.num_periods = -(-_CHANNELS // self.new_period)
        taps = published.kernel.shape[-1]
        kernel = published.kernel.new_zeros(self.num_periods, self.new_period, 1, taps + self.stride - self.period)
        for number, shifted in enumerate(kernel):
            shifted[..., number * self.period :][..., :taps] = published.kernel
        self.register_buffer("kernel", kernel.flatten(0, 1), persistent=False)

    @property
    def stride(self) -> int:
        """Count the samples that are taken in at a time."""
        return self.num_periods * self.period

    def forward(self, waveform: Tensor) -> Tensor:
        padded = functional.pad(waveform, (self.width, self.width + self.stride))
        made = functional.conv1d(padded[:, None], self.kernel, stride=self.stride)
        return made.mT.flatten(1)[:, : -(-waveform.shape[1] * self.new_period // self.period)]


@lru_cache(maxsize=32)
def resampler(from_hz: int, to_hz: int, device: torch.device) -> Resampler:
    """Build the filter once per pair of rates and device."""
    with torch.inference_mode(False):  # a filter born in inference mode could never serve training
        return Resampler(from_hz, to_hz).to(device)


def resample(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Resample (B, S) float or int16 on its device to (B, ceil(S * to_hz / from_hz)) float32, differentiably."""
    waveform = to_float(waveform)
    if from_hz == to_hz:
        return waveform
    if not len(waveform):  # a convolution of nothing fails
        return waveform.new_zeros(0, resampled_samples(waveform.shape[-1], from_hz, to_hz))
    with torch.autocast(waveform.device.type, enabled=False):
        return resampler(from_hz, to_hz, waveform.device)(waveform)


def resampled_samples(num_samples: Tensor | int, from_hz: int, to_hz: int) -> Tensor | int:
    """Count the samples `resample` makes of `num_samples`."""
    return -(-num_samples * to_hz // from_hz)


def resample_blocks(blocks: Iterable[Tensor], from_hz: int, to_hz: int) -> Iterator[Tensor]:
    """Resample a recording that comes in blocks (S,), float or int16, on their device; memory stays at some blocks.

    Together the results are what `resample` makes of the whole, to rounding; but for rates whose filter would fill the
    memory (22254 to 16000 Hz), which soxr resamples on the CPU.
    """
    pieces = (to_float(piece) for block in blocks for piece in block.split(block_samples(from_hz, to_hz)))
    if from_hz == to_hz:
        yield from pieces
        return
    common = math.gcd(from_hz, to_hz)
    period, new_period = from_hz // common, to_hz // common
    if period * new_period > _FILTER_VALUES:
        yield from _by_soxr(pieces, from_hz, to_hz)
        return
    held, first, done = torch.empty(0), 0, 0  # samples not yet let go, the first one's period, periods resampled
    for piece in pieces:
        reach = resampler(from_hz, to_hz, piece.device).width  # samples that a period needs on either side of its own
        held = piece if not len(held) else torch.cat([held, piece])
        whole = first + (len(held) - reach) // period
        if whole > done:
            found = resample(held[None, : (whole - first) * period + reach], from_hz, to_hz)[0]
            yield found[(done - first) * new_period : (whole - first) * new_period]
            done = whole
            let_go = max(0, done - first - -(-reach // period))
            held, first = held[let_go * period :], first + let_go
    if len(held):
        yield resample(held[None], from_hz, to_hz)[0, (done - first) * new_period :]


def block_samples(from_hz: int, to_hz: int) -> int:
    """Count the samples at `from_hz` that are resampled to `to_hz` at a time: as much on either side as is cheap."""
    return max(1, _BLOCK_SAMPLES * from_hz // max(from_hz, to_hz))


def _by_soxr(pieces: Iterable[Tensor], from_hz: int, to_hz: int) -> Iterator[Tensor]:
    """Resample in blocks to as many samples as `resample` gives; soxr itself rounds, which at times is one less."""
    stream, heard, given = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ"), 0, 0
    device = torch.device("cpu")
    for piece in pieces:
        device, heard = piece.device, heard + len(piece)
        found = stream.resample_chunk(piece.cpu().numpy())
        given += len(found)
        yield torch.from_numpy(found).to(device)
    silence = np.zeros(2 * -(-from_hz // to_hz), np.float32)  # two samples more; soxr sees nothing else at an end
    last = stream.resample_chunk(silence, last=True)
    yield torch.from_numpy(last[: resampled_samples(heard, from_hz, to_hz) - given]).to(device)
