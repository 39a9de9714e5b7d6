"""What does an encoder say of a clip of any length?

A clip is cut into windows as long as the front end's spectrogram, each goes through the frozen encoder with nothing
hidden, and the tokens of all windows are pooled into one vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from audiossl.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Hold a batch of equal windows cut from clips: which clip each is of, and how many of its frames are audio."""

    clip: Tensor  # (B,) int64
    spectrogram: Tensor  # (B, 1, F, T)
    valid_frames: Tensor  # (B,) int64


def windows_of(frontend: nn.Module, waveforms: Sequence[NDArray], batch_size: int) -> Iterator[Windows]:
    """Cut clips (S,), int16 or float at the front end's rate, into windows of its length; the last ones are padded.

    A rest too short for one frame is dropped. A front end without a fixed length takes each clip as one window.
    """
    shortest = frontend.samples_for(1)
    longest = max(len(waveform) for waveform in waveforms)
    length = longest if frontend.frames is None else frontend.samples_for(frontend.frames)
    places = [
        (clip, start)
        for clip, waveform in enumerate(waveforms)
        for start in range(0, max(len(waveform), 1), length)
        if start == 0 or len(waveform) - start >= shortest
    ]
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        pieces = [torch.from_numpy(waveforms[clip][start : start + length]) for clip, start in batch]
        num_samples = torch.tensor([len(piece) for piece in pieces])
        padded = torch.stack([functional.pad(piece, (0, length - len(piece))) for piece in pieces])
        spectrogram = frontend(padded.to(frontend.window.device), num_samples=num_samples)
        valid = valid_frames(frontend, num_samples).clamp(max=spectrogram.shape[-1])
        yield Windows(torch.tensor([clip for clip, _ in batch]), spectrogram, valid)


def valid_frames(frontend: nn.Module, num_samples: Tensor) -> Tensor:
    """Count the frames that hold audio, at least 1: (B,) samples -> (B,) frames."""
    return 1 + (num_samples - frontend.samples_for(1)).clamp(min=0) // frontend.hop_samples


@torch.no_grad()
def clip_features(
    encoder: nn.Module,
    frontend: nn.Module,
    waveforms: Sequence[NDArray],
    *,
    batch_size: int,
    pooling: Literal["max", "mean", "class"] = "max",
) -> NDArray[np.float32]:
    """Describe each clip by the frozen encoder's tokens, pooled channel by channel: (clips, D).

    `pooling` takes the maximum over the patch tokens, their mean, or the mean of the windows' class tokens. Differs:
    Audio-MAE's fine-tuning takes the mean, which drowns a short event in a long clip. Within ESC-10's folds 1-3 the
    maximum was better for every encoder tried, the untrained one too (docs/log.md).

    Nothing is hidden. Columns of patches that are half padding or more are left out. Modes are put back afterwards; no
    random number is drawn. Raises `UserError` for class tokens of an encoder that has none.
    """
    if pooling == "class" and not encoder.num_class_tokens:
        raise UserError("probe.pooling=class: this encoder has no class token; take max or mean")
    pooled = torch.full((len(waveforms), encoder.width), -torch.inf if pooling == "max" else 0.0)
    counts = torch.zeros(len(waveforms), 1)
    with evaluating(encoder, frontend):
        for windows in windows_of(frontend, waveforms, batch_size):
            grid = encoder.grid_for(windows.spectrogram)
            classes, patches = (
                encoder(windows.spectrogram).float().cpu().tensor_split([encoder.num_class_tokens], dim=1)
            )
            middle = (torch.arange(grid[1]) + 0.5) * windows.spectrogram.shape[-1] / grid[1]
            middle[0] = 0  # a clip shorter than half a patch still has one column
            is_audio = (middle < windows.valid_frames[:, None]).repeat(1, grid[0])[:, :, None]  # (B, rows * columns, 1)
            if pooling == "max":
                peaks = patches.masked_fill(~is_audio, -torch.inf).amax(1)
                for clip, peak in zip(windows.clip.tolist(), peaks, strict=True):
                    pooled[clip] = pooled[clip].maximum(peak)
            else:
                of_class = pooling == "class"
                sums = classes.mean(1) if of_class else (patches * is_audio).sum(1)
                pooled.index_add_(0, windows.clip, sums)
                counts.index_add_(0, windows.clip, torch.ones(len(sums), 1) if of_class else is_audio.sum(1).float())
    return (pooled if pooling == "max" else pooled / counts).numpy()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Switch to evaluation; give every submodule its own mode back, as some may have been frozen."""
    modes = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
