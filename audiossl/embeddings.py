"""What does an encoder say of a recording of any length, and of every moment of it?

A clip is cut into windows as long as the front end's spectrogram, each goes through the frozen encoder with nothing
hidden, and of its tokens come the features of every moment and one vector for the whole. Windows are streamed: what
grows with a recording is its features alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audiossl.errors import UserError
from audiossl.features.description import Choice, Description, Layers, Pooling, Rows, described
from audiossl.features.windows import Layout, valid_frames, windows_of
from audiossl.sound.audio import MAX_RATE_HZ, MIN_RATE_HZ, AudioError, to_int16
from audiossl.sound.files import open_audio
from audiossl.sound.waveform import block_samples, resample_blocks

if TYPE_CHECKING:
    from audiossl.pretrained import PretrainedEncoder

log = logging.getLogger(__name__)

CLIPPED_PEAK, MAX_PEAK = 1.5, 100.0  # of a file's samples: resampling overshoots by some 10 %; what is no waveform

__all__ = ["Embeddings", "clip_features", "embed", "evaluating", "valid_frames", "windows_of"]


@dataclass(frozen=True)
class Embeddings:
    """Hold what an encoder says of B clips, on the CPU, float32.

    `clip` (B, D') describes each as a whole and `frames` (B, T', D") every column of patches, None where they were not
    asked for; `timestamps_seconds` (T',) are the middles of the columns, the same for all clips. A clip shorter than
    the longest has `num_frames` (B,) of them and zeros behind.
    """

    clip: Tensor
    frames: Tensor | None
    timestamps_seconds: Tensor
    num_frames: Tensor


@torch.no_grad()
def embed(
    model: PretrainedEncoder,
    waveform: Tensor | NDArray | str | Path,
    sample_rate: int | None = None,
    *,
    num_samples: Tensor | Sequence[int] | None = None,
    layers: Layers = "last",
    pooling: Pooling = "mean",
    rows: Rows = "mean",
    overlap: float = 0.5,
    with_frames: bool = True,
    batch_size: int = 16,
) -> Embeddings:
    """Describe a clip (S,), clips (B, S) or a file, of any length and rate, as wholes and moment by moment.

    `waveform`: float in [-1, 1] or int16, torch or numpy, at `sample_rate` Hz and resampled on the model's device; or
    the name of a file, which is streamed. `num_samples` (B,) is how much of each row is audio; the rest never counts.

    `layers`: "last", the n last blocks, or a list of blocks (0 the first); several are concatenated in that order, each
    with the encoder's final norm, as ATST's frozen features are (2306.04186). `rows`: patches above each other in a
    column are averaged (mean), or concatenated as in MSM-MAE (2204.12260). `pooling` of the clip's vector: mean or max
    over the patches, the class tokens (several are averaged), or both side by side (class+mean).

    Windows are as long as the model knows, `batch_size` at a time, and share `overlap` of their length: at a half,
    every moment is described with a quarter of a window or more on either side, the clip's ends excepted; 0 takes half
    the time. In the overlap the window nearest by its middle counts: averages of windows would be features that the
    encoder never gives. Class tokens count by the columns that their window is for.

    No gradients, nothing random, modes as they were. Raises `UserError` for samples that are not finite, for none, and
    for what the encoder does not have.
    """
    choice = Choice(layers, pooling, rows, overlap, with_frames)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size={batch_size}: how many windows go through at a time, at least 1")
    if isinstance(waveform, str | Path):
        sources, names = [file_blocks(waveform, model)], [str(waveform)]
    else:
        clips = as_clips(waveform, num_samples)
        check_rate(sample_rate)
        sources = [_row_blocks(clip, int(sample_rate), model) for clip in clips]
        names = [f"clip {number}" for number in range(len(clips))]
    found: list[Description] = [None] * len(sources)
    with evaluating(model):
        for number, result in described(model, sources, choice, batch_size):
            if isinstance(result, AudioError):
                raise UserError(f"{names[number]}: {result}") from result
            found[number] = result
    return _gather(model, found, choice)


def _gather(model: PretrainedEncoder, found: list[Description], choice: Choice) -> Embeddings:
    num_frames = torch.tensor([clip.num_frames for clip in found], dtype=torch.int64)
    times = timestamps_seconds(model, max(num_frames.tolist(), default=0))
    if not found:
        width = model.width * len(choice.blocks(model))
        wide = width * (model.encoder.grid[0] if choice.rows == "concat" else 1)
        of_clip = width * ("class" in choice.pooling) + wide * (choice.pooling != "class")
        return Embeddings(
            torch.zeros(0, of_clip), torch.zeros(0, 0, wide) if choice.with_frames else None, times, num_frames
        )
    frames = None
    if choice.with_frames:
        frames = nn.utils.rnn.pad_sequence([clip.all_frames() for clip in found], batch_first=True)
    return Embeddings(torch.stack([clip.pooled(choice.pooling) for clip in found]), frames, times, num_frames)


def timestamps_seconds(model: PretrainedEncoder, num_frames: int) -> Tensor:
    """Say where in a clip the middles of its columns lie: (num_frames,) float64."""
    layout = Layout.of(model.encoder, model.frontend, 0.0)
    return (layout.middle + layout.column * torch.arange(num_frames, dtype=torch.float64)) / model.rate_hz


def file_blocks(
    path: str | Path, model: PretrainedEncoder, progress: Callable[[float, float | None], object] | None = None
) -> Iterator[Tensor]:
    """Stream a file as blocks (S,) at the model's rate on its device; `progress` hears of each block how many
    seconds it has, and which share of the file is through (None where the file does not tell its length).

    Samples are rounded to 16 bits, as packed clips are: what lossy files hold below that, training never hears. Peaks
    over full scale are clipped, with a warning above 1.5.

    Raises `AudioError` for what cannot be used.
    """
    device = model.frontend.window.device
    with open_audio(path) as stream:

        def blocks() -> Iterator[Tensor]:
            taken, peak = 0, 0.0
            for block in stream.blocks:
                peak = max(peak, float(np.abs(block).max(initial=0.0)))
                if peak > MAX_PEAK:
                    raise AudioError(f"samples reach {peak:.3g}, where full scale is 1")
                yield torch.from_numpy(to_int16(block)).to(device)
                taken += len(block)
                if progress is not None:
                    progress(len(block) / stream.rate_hz, taken / stream.num_frames if stream.num_frames else None)
            if peak > CLIPPED_PEAK:
                log.warning("%s: samples reach %.3g, where full scale is 1: clipped, as packing does", path, peak)

        yield from resample_blocks(blocks(), stream.rate_hz, model.rate_hz)


def _row_blocks(row: Tensor, rate_hz: int, model: PretrainedEncoder) -> Iterator[Tensor]:
    """Give a clip (S,) as blocks at the model's rate on its device."""

    def blocks() -> Iterator[Tensor]:
        if not len(row):
            raise AudioError("no samples")
        for block in row.split(block_samples(rate_hz, model.rate_hz)):
            block = block.to(model.frontend.window.device)
            if block.is_floating_point() and not block.isfinite().all():
                raise AudioError("NaN or Inf samples")
            yield block

    return resample_blocks(blocks(), rate_hz, model.rate_hz)


def as_clips(waveform: Tensor | NDArray, num_samples: Tensor | Sequence[int] | None) -> list[Tensor]:
    """List the clips (S,) of a waveform (S,) or (B, S), each cut to its `num_samples`; raise `UserError` for others."""
    try:
        if isinstance(waveform, np.ndarray):  # torch takes no other byte order, and no step backwards
            waveform = np.require(waveform, waveform.dtype.newbyteorder("="), ["C", "W"])
        waveform = torch.as_tensor(waveform)
    except (TypeError, ValueError) as error:
        raise UserError(f"a waveform is a tensor or an array (S,) or (B, S), or a file name: {error}") from error
    if waveform.ndim not in (1, 2):
        raise UserError(f"a waveform of shape {tuple(waveform.shape)}: give (S,) or (B, S), channels averaged")
    if waveform.dtype != torch.int16 and not waveform.is_floating_point():
        raise UserError(f"a waveform of {str(waveform.dtype).removeprefix('torch.')}: give float in [-1, 1], or int16")
    clips = list(waveform.detach().unsqueeze(0) if waveform.ndim == 1 else waveform.detach())
    if num_samples is None:
        return clips
    counts = np.reshape(num_samples.tolist() if isinstance(num_samples, Tensor) else num_samples, -1).tolist()
    if len(counts) != len(clips) or not all(count in range(waveform.shape[-1] + 1) for count in counts):
        raise UserError(f"num_samples={counts[:8]}: one for each of {len(clips)} clips, at most {waveform.shape[-1]}")
    return [clip[: int(count)] for clip, count in zip(clips, counts, strict=True)]


def check_rate(rate_hz: int | None) -> None:
    """Raise `UserError` for a sample rate that cannot be meant."""
    if rate_hz not in range(MIN_RATE_HZ, MAX_RATE_HZ + 1):
        raise UserError(f"sample_rate={rate_hz}: whole Hz between {MIN_RATE_HZ} and {MAX_RATE_HZ}")


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
