"""What does a log-mel spectrogram sound like?

Mel bands say how much power there is, not in which FFT bin nor with what phase. The power of the bins is found by
non-negative fitting (the bands are sums of bins, so multiplicative updates keep it non-negative), the phase by
Griffin-Lim, and the front end's pre-emphasis is undone at the end. Nothing is learned, so what is heard is what the
spectrogram holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn import functional
from torchaudio.functional import griffinlim, lfilter

from audiossl.errors import UserError
from audiossl.plots import DB_PER_NEPER
from audiossl.spectrogram import FrontEnd, KaldiFbank

NUM_FITTING_STEPS = 50  # 30, 200 and 1000 give the same waveform error to 0.01 dB
QUIETEST_DB = 60.0  # cells further below the loudest one do not count as error


def linear_power(mel_power: Tensor, mel_matrix: Tensor) -> Tensor:
    """Find the power of FFT bins whose mel bands are `mel_power`: (F, T) -> (n_fft // 2 + 1, T), non-negative.

    Multiplicative updates for the Kullback-Leibler divergence (Lee and Seung, NeurIPS 2000): they stay non-negative,
    and quiet bands count, where least squares would fit the loudest alone. Bins that no band covers are 0.
    """
    tiny = torch.finfo(torch.float32).tiny
    share = mel_matrix / mel_matrix.sum(dim=0).clamp_min(tiny)  # each bin's weights sum to 1, or are all 0
    power = share.T @ (mel_power / mel_matrix.sum(dim=1, keepdim=True).clamp_min(tiny))
    for _ in range(NUM_FITTING_STEPS):
        power = power * (share.T @ (mel_power / (mel_matrix @ power).clamp_min(1e-20)))
    return power


def waveform_from_log_mel(log_mel: Tensor, frontend: FrontEnd, *, num_iterations: int = 64, seed: int = 0) -> Tensor:
    """Turn natural-log mel power (F, T), as `frontend.denormalise` gives it, into a waveform (S,) on the CPU.

    S is `frontend.samples_for(T)`, and frame 0 lies where the front end had it. The phase starts at random from `seed`;
    the caller's random state stays as it was.
    """
    assert log_mel.ndim == 2, f"expected one clip (F, T), got {tuple(log_mel.shape)}"
    hop, window = frontend.hop_samples, frontend.window_samples
    power = linear_power(log_mel.detach().float().cpu().exp(), frontend.mel_matrix().float().cpu())
    # Griffin-Lim puts a frame's centre where Kaldi has its start: half a window more is heard at both ends
    lead = window // 2 if isinstance(frontend, KaldiFbank) else 0
    margin = -(-frontend.n_fft // 2 // hop)
    power = functional.pad(power[None], (margin, margin), mode="replicate")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = dict(n_fft=frontend.n_fft, hop_length=hop, win_length=window, power=2.0)
        settings = dict(n_iter=num_iterations, momentum=0.99, length=None, rand_init=True)
        waveform = griffinlim(power, frontend.window.cpu(), **sizes, **settings)[0]
    waveform = waveform[margin * hop - lead :]
    pre_emphasis = float(getattr(frontend, "preemphasis", 0.0))
    if pre_emphasis:
        feedback, direct = torch.tensor([1.0, -pre_emphasis]), torch.tensor([1.0, 0.0])
        waveform = lfilter(waveform, feedback, direct, clamp=False)
    return waveform[: frontend.samples_for(log_mel.shape[1])]


def inversion_error_db(waveform: Tensor, log_mel: Tensor, frontend: FrontEnd) -> float:
    """Measure the median distance, in dB, between the log-mel of a waveform (S,) and the one it was made from (F, T).

    Only cells within 60 dB of the loudest count: below lies what nobody hears beside it.
    """
    device = frontend.window.device
    heard = frontend.denormalise(frontend(waveform[None].to(device)))[0, 0].cpu()
    wanted = log_mel.detach().float().cpu()
    frames = min(heard.shape[1], wanted.shape[1])
    heard, wanted = heard[:, :frames], wanted[:, :frames]
    counted = wanted > wanted.max() - QUIETEST_DB / DB_PER_NEPER
    return float((heard - wanted)[counted].abs().median() * DB_PER_NEPER)


def write_wav(path: Path | str, parts: Sequence[Tensor], rate_hz: int, gap_seconds: float = 0.5) -> None:
    """Write waveforms (S,) after one another, silence between, as 16-bit PCM.

    All parts are turned down by one factor if any would clip, so their levels still compare.
    """
    gap = np.zeros(round(gap_seconds * rate_hz), dtype=np.float32)
    pieces = [piece for part in parts for piece in (gap, part.detach().float().cpu().numpy())][1:]
    waveform = np.concatenate(pieces)
    peak = float(np.abs(waveform).max(initial=0.0))
    try:
        soundfile.write(path, waveform * min(1.0, 0.99 / max(peak, 1e-9)), rate_hz, subtype="PCM_16")
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
