"""How does a waveform become the log-mel spectrogram a model sees?

Every front end takes the same way: cut or pad the waveform, take the power spectrum of overlapping windows, sum it into
mel bands, take a logarithm, shift and scale. `FrontEnd.transform` is that way. It is batched, runs where the waveform
is, can be differentiated, and computes in float32 whatever the precision around it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from audiossl.errors import UserError
from audiossl.noise import Noise
from audiossl.sound.mel import check_bands, whole_frames, whole_samples
from audiossl.sound.waveform import to_float


def beyond(num_valid: Tensor, length: int) -> Tensor:
    """Mark the positions behind the first `num_valid` (B, 1): (B, length) bool."""
    return torch.arange(length, device=num_valid.device) >= num_valid


class FrontEnd(nn.Module):
    """Hold what the three front ends share; `transform` is the way of a clip.

    Attributes: `rate_hz` of the waveform; `window_samples`, `hop_samples`, `n_fft`; `num_mels`; `window`, the weights
    (window_samples,); `frames`, the length every spectrogram is brought to, or None for the clip's own.
    """

    def __init__(
        self,
        *,
        rate_hz: int,
        window_ms: float,
        hop_ms: float,
        n_fft: int | None,
        num_mels: int,
        fmin_hz: float,
        fmax_hz: float | None,
        seconds: float | None,
        centre: float,
        scale: float,
        periodic: bool,
    ):
        super().__init__()
        fmax_hz = rate_hz / 2 if fmax_hz is None else fmax_hz
        self.rate_hz, self.num_mels, self.fmin_hz, self.fmax_hz = rate_hz, num_mels, fmin_hz, fmax_hz
        self.window_samples = whole_samples("window_ms", window_ms, rate_hz)
        self.hop_samples = whole_samples("hop_ms", hop_ms, rate_hz)
        self.n_fft = 2 ** math.ceil(math.log2(self.window_samples)) if n_fft is None else n_fft
        if self.n_fft < self.window_samples or self.n_fft % 2:
            raise UserError(
                f"frontend.n_fft={n_fft} must be even and hold frontend.window_ms={window_ms:g}: "
                f"{self.window_samples} samples at {rate_hz} Hz; {2 ** math.ceil(math.log2(self.window_samples))} does"
            )
        check_bands(num_mels, self.n_fft, rate_hz, fmin_hz, fmax_hz)
        if not scale > 0:
            raise UserError(f"cannot divide by {scale:g}: frontend.std (max_db - min_db for ATST) must be positive")
        self.frames = None if seconds is None else whole_frames(seconds, hop_ms)
        self.centre, self.scale = centre, scale
        self.register_buffer("window", torch.hann_window(self.window_samples, periodic=periodic), persistent=False)
        self.register_buffer("mel", self.mel_matrix(), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to its device but keep float32: `model.bfloat16()` would ruin the window."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        self._buffers.update({name: kept[name].to(moved.device) for name, moved in self._buffers.items()})
        return self

    def forward(self, waveform: Tensor, num_samples: Tensor | None = None, generator: Noise | None = None) -> Tensor:
        """Turn waveforms (B, S), float in [-1, 1] or int16, into normalised log-mel spectrograms (B, 1, F, T).

        `num_samples` (B,) says how much of each row is audio; the rest is ignored and treated as the padding of the
        method. T is `frames`, or follows from S. Clips too short for one window are padded with zeros.
        """
        return self.spectrogram(waveform, num_samples, self.mel)

    def spectrogram(self, waveform: Tensor, num_samples: Tensor | None, mel: Tensor) -> Tensor:
        """Take the way with an explicit mel matrix (F, n_fft // 2 + 1): (B, S) -> (B, 1, F, T)."""
        assert waveform.ndim == 2, f"expected a batch of mono waveforms (B, S), got {tuple(waveform.shape)}"
        clips, samples = waveform.shape
        if num_samples is None:
            num_samples = torch.full((clips,), samples, device=waveform.device)
        num_samples = num_samples.to(waveform.device).clamp(0, samples)[:, None]
        mel = mel.to(waveform.device)
        at_once = 1 if waveform.device.type == "cpu" else max(clips, 1)  # one clip's frames stay in a CPU's cache
        parts = zip(waveform.split(at_once), num_samples.split(at_once), strict=True)
        with torch.autocast(waveform.device.type, enabled=False):
            return torch.cat([self.transform(to_float(some), counts, mel) for some, counts in parts])

    def transform(self, waveform: Tensor, num_samples: Tensor, mel: Tensor) -> Tensor:
        """Take every step: (B, S) float32 with `num_samples` (B, 1) valid -> (B, 1, F, T)."""
        waveform = self.fit(self.level(waveform, num_samples), num_samples)
        log_mel = self.pad(self.log(mel @ self.power(waveform)), num_samples)[..., : self.frames]
        return ((log_mel - self.centre) / self.scale)[:, None]

    def denormalise(self, spectrogram: Tensor) -> Tensor:
        """Undo the normalisation: (B, 1, F, T) as `forward` returns it -> natural logarithm of mel power."""
        return self.natural_log(spectrogram.float() * self.scale + self.centre)

    def mel_matrix(self) -> Tensor:
        """Return the mel matrix (F, n_fft // 2 + 1): mel power = mel_matrix @ power spectrum."""
        raise NotImplementedError

    def samples_for(self, frames: int) -> int:
        """Count the samples that give exactly `frames` frames of audio, without padding."""
        raise NotImplementedError

    def first_middle(self) -> float:
        """Say where the middle of the first frame lies, in samples: at 0 for centred windows."""
        return 0.0

    def level(self, waveform: Tensor, num_samples: Tensor) -> Tensor:
        """Remove what the method removes from a whole waveform (B, S): nothing, unless a front end says otherwise."""
        return waveform

    def fit(self, waveform: Tensor, num_samples: Tensor) -> Tensor:
        """Put zeros behind the valid samples, then cut or pad (B, S) to what `frames` and one window need."""
        waveform = waveform.masked_fill(beyond(num_samples, waveform.shape[-1]), 0.0)
        wanted = waveform.shape[-1] if self.frames is None else self.samples_for(self.frames)
        return functional.pad(waveform, (0, max(wanted, self.shortest()) - waveform.shape[-1]))

    def shortest(self) -> int:
        """Count the samples below which the transform cannot run."""
        return self.n_fft // 2 + 1  # reflection needs one sample more than it mirrors

    def power(self, waveform: Tensor) -> Tensor:
        """Take the power spectrum of centred windows, the ends reflected: (B, S) -> (B, n_fft // 2 + 1, T)."""
        sizes = dict(n_fft=self.n_fft, hop_length=self.hop_samples, win_length=self.window_samples)
        spectrum = torch.stft(waveform, **sizes, window=self.window, pad_mode="reflect", return_complex=True)
        return spectrum.real.square() + spectrum.imag.square()

    def log(self, mel_power: Tensor) -> Tensor:
        """Take the method's logarithm of mel power (B, F, T)."""
        raise NotImplementedError

    def pad(self, log_mel: Tensor, num_samples: Tensor) -> Tensor:
        """Mark the frames of (B, F, T) that hold no audio: done by the zeros of `fit`, unless a front end says so."""
        return log_mel

    def natural_log(self, log_mel: Tensor) -> Tensor:
        """Convert the method's logarithm to the natural logarithm of mel power."""
        raise NotImplementedError
