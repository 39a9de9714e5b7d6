"""What does a mel band hear, and how do durations become whole samples and frames?

A mel matrix (F bands, n_fft // 2 + 1 bins) sums the power of neighbouring FFT bins into bands that widen with
frequency. Audio-MAE and PaSST use Kaldi's triangles, straight in mel; ATST uses HTK's, straight in Hz. Settings that
would be rounded in silence are refused here, with the nearest one that works.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchaudio.compliance.kaldi import get_mel_banks
from torchaudio.functional import melscale_fbanks

from audiossl.errors import UserError


def kaldi_mel_matrix(num_mels: int, n_fft: int, rate_hz: int, fmin_hz: float, fmax_hz: float) -> Tensor:
    """Build Kaldi's triangles, m(f) = 1127 ln(1 + f / 700): (num_mels, n_fft // 2 + 1), the Nyquist bin unheard."""
    warp = dict(vtln_low=100.0, vtln_high=-500.0, vtln_warp_factor=1.0)  # a factor of 1 warps nothing
    triangles, _ = get_mel_banks(num_mels, n_fft, float(rate_hz), float(fmin_hz), float(fmax_hz), **warp)
    return functional.pad(triangles, (0, 1))


def htk_mel_matrix(num_mels: int, n_fft: int, rate_hz: int, fmin_hz: float, fmax_hz: float) -> Tensor:
    """Build HTK's triangles, m(f) = 2595 log10(1 + f / 700), no area normalisation: (num_mels, n_fft // 2 + 1)."""
    with warnings.catch_warnings():  # an empty band is allowed, as it is in the published Kaldi setting
        warnings.simplefilter("ignore", UserWarning)
        matrix = melscale_fbanks(n_fft // 2 + 1, float(fmin_hz), float(fmax_hz), num_mels, rate_hz)
    return matrix.T.contiguous()


def band_centres_hz(num_mels: int, fmin_hz: float, fmax_hz: float) -> NDArray:
    """Say where bands are centred, in Hz: evenly between the bounds in mel, on which Kaldi's and HTK's scales agree."""
    low, high = np.log1p(np.array([fmin_hz, fmax_hz]) / 700)
    return 700 * np.expm1(low + (high - low) * np.arange(1, num_mels + 1) / (num_mels + 1))


def check_bands(num_mels: int, n_fft: int, rate_hz: int, fmin_hz: float, fmax_hz: float) -> None:
    """Refuse a frequency range that is empty or past Nyquist, and more bands than the FFT has bins in that range.

    Single empty bands pass: the published Audio-MAE setting has one (band 3), because its lowest triangles are narrower
    than a bin.
    """
    if not 0 <= fmin_hz < fmax_hz <= rate_hz / 2:
        raise UserError(
            f"frontend.fmin_hz={fmin_hz:.10g} and frontend.fmax_hz={fmax_hz:.10g} must satisfy "
            f"0 <= fmin_hz < fmax_hz <= {rate_hz / 2:.10g} (half of frontend.rate_hz={rate_hz})"
        )
    num_bins = int((fmax_hz - fmin_hz) * n_fft / rate_hz)
    if not 4 <= num_mels <= num_bins:
        raise UserError(
            f"frontend.num_mels={num_mels} must lie between 4 and {num_bins}, the FFT bins (n_fft={n_fft}) between "
            f"{fmin_hz:.10g} and {fmax_hz:.10g} Hz; take fewer mels or a longer window"
        )


def whole_samples(name: str, milliseconds: float, rate_hz: int) -> int:
    """Convert a duration to samples; raise UserError naming the nearest duration that is a whole number of them."""
    exact = milliseconds * rate_hz / 1000
    nearest = max(round(exact), 1)
    if abs(exact - nearest) > 1e-6:
        raise UserError(
            f"frontend.{name}={milliseconds:.10g} is {exact:.10g} samples at {rate_hz} Hz, not a whole number; "
            f"the nearest that is: {nearest * 1000 / rate_hz:.10g} ({nearest} samples)"
        )
    return nearest


def whole_frames(seconds: float, hop_ms: float) -> int:
    """Convert a length to frames; raise UserError naming the nearest length that is a whole number of hops."""
    exact = seconds * 1000 / hop_ms
    nearest = max(round(exact), 1)
    if abs(exact - nearest) > 1e-6:
        raise UserError(
            f"frontend.seconds={seconds:.10g} is {exact:.10g} hops of frontend.hop_ms={hop_ms:.10g}, not a whole "
            f"number; the nearest that is: {nearest * hop_ms / 1000:.10g} ({nearest} frames)"
        )
    return nearest
