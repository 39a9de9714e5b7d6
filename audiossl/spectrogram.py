"""Which log-mel spectrogram do the published models expect?

Three settings of one way (`frontend.FrontEnd`): Audio-MAE's (arXiv 2207.06405), ATST's (arXiv 2204.12076, 2306.04186)
and PaSST's (arXiv 2110.05069). They differ in framing, mel scale, logarithm and in what padding looks like. Where paper
and published code disagree, the code that trained the weights is followed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from audiossl.errors import UserError
from audiossl.noise import Noise
from audiossl.sound.frontend import FrontEnd, beyond
from audiossl.sound.mel import htk_mel_matrix, kaldi_mel_matrix
from audiossl.sound.waveform import resample, resampled_samples, to_float
from audiossl.stepping.hostcopy import send

__all__ = ["AtstMel", "FrontEnd", "KaldiFbank", "PasstMel", "resample", "resampled_samples", "to_float"]

SILENCE = 1e-10  # mel power below which nothing is told apart: ATST's floor, and what ln(x + 1e-5) of PaSST hides


class KaldiFbank(FrontEnd):
    """Compute Audio-MAE's log-mel: Kaldi filter bank energies, padded with raw zeros, then (x - mean) / (2 std).

    A raw zero is louder than the average: with AudioSet's statistics the padding becomes +0.467. The published weights
    were trained so. Equals `torchaudio.compliance.kaldi.fbank(htk_compat=True, dither=0, window_type="hanning")`, which
    takes one channel of one clip, for a whole batch. `fmax_hz` None means half of `rate_hz`.
    """

    def __init__(
        self,
        *,
        rate_hz: int,
        window_ms: float,
        hop_ms: float,
        num_mels: int,
        fmin_hz: float,
        fmax_hz: float | None,
        preemphasis: float,
        mean: float,
        std: float,
        seconds: float | None,
    ):
        sizes = dict(rate_hz=rate_hz, window_ms=window_ms, hop_ms=hop_ms, n_fft=None, num_mels=num_mels)
        bounds = dict(fmin_hz=fmin_hz, fmax_hz=fmax_hz, seconds=seconds)
        super().__init__(**sizes, **bounds, centre=mean, scale=2 * std, periodic=False)
        self.preemphasis = preemphasis

    def mel_matrix(self) -> Tensor:
        return kaldi_mel_matrix(self.num_mels, self.n_fft, self.rate_hz, self.fmin_hz, self.fmax_hz)

    def samples_for(self, frames: int) -> int:
        return self.window_samples + (frames - 1) * self.hop_samples

    def first_middle(self) -> float:
        return self.window_samples / 2

    def shortest(self) -> int:
        return self.window_samples

    def level(self, waveform: Tensor, num_samples: Tensor) -> Tensor:
        audio = waveform.masked_fill(beyond(num_samples, waveform.shape[-1]), 0.0)
        return waveform - audio.sum(-1, keepdim=True) / num_samples.clamp(min=1)

    def power(self, waveform: Tensor) -> Tensor:
        frames = waveform.unfold(-1, self.window_samples, self.hop_samples)  # (B, T, W), none reaches past the end
        frames = frames - frames.mean(-1, keepdim=True)
        previous = torch.cat(
            [frames[..., :1], frames[..., :-1]], -1
        )  # each frame starts anew: its first sample is its own
        spectrum = torch.fft.rfft((frames - self.preemphasis * previous) * self.window, self.n_fft)
        return (spectrum.real.square() + spectrum.imag.square()).mT

    def log(self, mel_power: Tensor) -> Tensor:
        return mel_power.clamp(min=torch.finfo(torch.float32).eps).log()

    def pad(self, log_mel: Tensor, num_samples: Tensor) -> Tensor:
        real_frames = (1 + (num_samples - self.window_samples) // self.hop_samples).clamp(min=1)
        return log_mel.masked_fill(beyond(real_frames, log_mel.shape[-1])[:, None], 0.0)

    def natural_log(self, log_mel: Tensor) -> Tensor:
        return log_mel


class AtstMel(FrontEnd):
    """Compute ATST's log-mel: decibels, scaled so that [min_db, max_db] becomes [-1, 1].

    Decibels stop `floor_db` below each clip's own maximum, never the batch's, so a clip's picture is its own. Clips
    are padded with zeros on the waveform. Centred windows make 1 + S // hop frames: 1001 of 10 s.
    """

    def __init__(
        self,
        *,
        rate_hz: int,
        window_ms: float,
        hop_ms: float,
        n_fft: int,
        num_mels: int,
        fmin_hz: float,
        fmax_hz: float | None,
        floor_db: float,
        min_db: float,
        max_db: float,
        seconds: float | None,
    ):
        sizes = dict(rate_hz=rate_hz, window_ms=window_ms, hop_ms=hop_ms, n_fft=n_fft, num_mels=num_mels)
        middle, half = (min_db + max_db) / 2, (max_db - min_db) / 2
        bounds = dict(fmin_hz=fmin_hz, fmax_hz=fmax_hz, seconds=seconds)
        super().__init__(**sizes, **bounds, centre=middle, scale=half, periodic=True)
        self.floor_db = floor_db

    def mel_matrix(self) -> Tensor:
        return htk_mel_matrix(self.num_mels, self.n_fft, self.rate_hz, self.fmin_hz, self.fmax_hz)

    def samples_for(self, frames: int) -> int:
        return max((frames - 1) * self.hop_samples, 1)

    def log(self, mel_power: Tensor) -> Tensor:
        decibels = 10 * mel_power.clamp(min=SILENCE).log10()
        return decibels.maximum(decibels.amax((-2, -1), keepdim=True) - self.floor_db)

    def natural_log(self, log_mel: Tensor) -> Tensor:
        return log_mel * (math.log(10) / 10)


class PasstMel(FrontEnd):
    """Compute PaSST's log-mel: pre-emphasis, Kaldi's triangles, ln(x + log_offset), then (x - mean) / (2 std).

    In training, given a generator, each global batch draws its range: fmin_hz + {0 .. fmin_jitter_hz - 1} and
    fmax_hz + fmax_jitter_hz // 2 - {0 .. fmax_jitter_hz - 1}. The published masking of bands and frames is an
    augmentation, not part of this. Clips are padded with zeros on the waveform.
    """

    def __init__(
        self,
        *,
        rate_hz: int,
        window_ms: float,
        hop_ms: float,
        n_fft: int,
        num_mels: int,
        fmin_hz: float,
        fmax_hz: float,
        fmin_jitter_hz: int,
        fmax_jitter_hz: int,
        preemphasis: float,
        log_offset: float,
        mean: float,
        std: float,
        seconds: float | None,
    ):
        sizes = dict(rate_hz=rate_hz, window_ms=window_ms, hop_ms=hop_ms, n_fft=n_fft, num_mels=num_mels)
        bounds = dict(fmin_hz=fmin_hz, fmax_hz=fmax_hz, seconds=seconds)
        super().__init__(**sizes, **bounds, centre=mean, scale=2 * std, periodic=False)
        self.preemphasis, self.log_offset = preemphasis, log_offset
        self.fmin_jitter_hz, self.fmax_jitter_hz = fmin_jitter_hz, fmax_jitter_hz
        highest = fmax_hz + fmax_jitter_hz // 2
        crossing = highest - fmax_jitter_hz <= fmin_hz + fmin_jitter_hz
        if min(fmin_jitter_hz, fmax_jitter_hz) < 0 or highest > rate_hz / 2 or crossing:
            raise UserError(
                f"frontend.fmin_jitter_hz={fmin_jitter_hz} and frontend.fmax_jitter_hz={fmax_jitter_hz} must be >= 0 "
                f"and keep fmin_hz below fmax_hz and that within {rate_hz / 2:g} Hz; it would reach {highest:g}"
            )

    def forward(self, waveform: Tensor, num_samples: Tensor | None = None, generator: Noise | None = None) -> Tensor:
        if not self.training or generator is None:
            return self.spectrogram(waveform, num_samples, self.mel)
        mel = send(self.mel_matrix(*self.draw_range(generator)), waveform.device)
        return self.spectrogram(waveform, num_samples, mel)

    def draw_range(self, generator: Noise) -> tuple[float, float]:
        """Draw (fmin, fmax) in Hz for one global batch."""
        up = generator.randint(self.fmin_jitter_hz) if self.fmin_jitter_hz else 0
        down = generator.randint(self.fmax_jitter_hz) if self.fmax_jitter_hz else 0
        return self.fmin_hz + up, self.fmax_hz + self.fmax_jitter_hz // 2 - down

    def mel_matrix(self, fmin_hz: float | None = None, fmax_hz: float | None = None) -> Tensor:
        """Return the mel matrix (F, n_fft // 2 + 1) of the given range, or of evaluation's."""
        fmin_hz = self.fmin_hz if fmin_hz is None else fmin_hz
        fmax_hz = self.fmax_hz if fmax_hz is None else fmax_hz
        return kaldi_mel_matrix(self.num_mels, self.n_fft, self.rate_hz, fmin_hz, fmax_hz)

    def samples_for(self, frames: int) -> int:
        return frames * self.hop_samples

    def shortest(self) -> int:
        return super().shortest() + 1  # pre-emphasis takes one

    def power(self, waveform: Tensor) -> Tensor:
        return super().power(waveform[:, 1:] - self.preemphasis * waveform[:, :-1])

    def log(self, mel_power: Tensor) -> Tensor:
        return (mel_power + self.log_offset).log()

    def natural_log(self, log_mel: Tensor) -> Tensor:
        return (log_mel.exp() - self.log_offset).clamp(min=SILENCE).log()
