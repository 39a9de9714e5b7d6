"""How well does a fine-tuned classifier do on clips that it has never heard?

A clip longer than the model listens at once is heard in windows that overlap, and their logits are averaged; where the
model scores moments, each moment is scored by the window in whose middle it lies. The same with noise added shows what
the score is worth outside of the laboratory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from audiossl.batch import Batch
from audiossl.embeddings import evaluating
from audiossl.errors import UserError
from audiossl.features.windows import Layout, Piece, audio_columns, cut, valid_frames
from audiossl.finetuning import FineTuning
from audiossl.scoring.robustness import add_noise
from audiossl.sound.audio import AudioError

if TYPE_CHECKING:
    from audiossl.tasks import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Testing:
    """Say how a classifier is tested; the section `test` of conf/finetune.yaml."""

    weights: Literal["best", "last", "swa"]
    overlap: float | None
    batch_size: int
    bootstrap: int
    thresholds: float | Literal["validation"]
    median_frames: int
    snr_db: list[float] | None

    def __post_init__(self):
        if self.overlap is not None and not 0 <= self.overlap < 1:
            raise UserError(f"test.overlap={self.overlap}: at least 0 and below 1, or null for the middle only")
        if self.median_frames < 1 or self.median_frames % 2 == 0:
            raise UserError(f"test.median_frames={self.median_frames}: an odd number, 1 for no filter")
        if self.bootstrap < 0:
            raise UserError(f"test.bootstrap={self.bootstrap}: 0 for no intervals, or a number such as 1000")
        if self.thresholds != "validation" and not 0 < float(self.thresholds) < 1:
            raise UserError(f"test.thresholds={self.thresholds}: a probability above 0 and below 1, or validation")


@torch.no_grad()
def predicted(
    method: FineTuning,
    task: Task,
    clips: NDArray[np.int64],
    settings: Testing,
    bad: dict[int, str],
    *,
    is_windowed: bool,
    padding: Literal["zeros", "cyclic"],
    of_moments: bool,
    what: str,
    snr_db: float | None = None,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Score clips one by one: logits (C,) each, or (T', C) `of_moments`; those that cannot be read go into `bad`.

    `is_windowed`: clips longer than the model listens at once are heard in windows, else whole. `what` stands at the
    progress bar. With `snr_db` white noise of so much less power than the clip is added, the same in every call.
    """
    length = method.frontend.samples_for(method.frames) if is_windowed else None
    found: dict[int, list[tuple[Piece, Tensor]]] = {}
    device = next(method.parameters()).device
    with evaluating(method), tqdm(total=len(clips), unit="clip", desc=what, leave=False) as bar:
        heard = _heard(method, task, clips.tolist(), settings, is_windowed, bad, snr_db, bar)
        while windows := list(islice(heard, settings.batch_size)):
            for window in windows:
                found.setdefault(window.clip, [])
            for group in _alike(windows):
                batch = _batch(group, length, padding, device)
                logits = (method.logits if of_moments else method.clip_logits)(batch).float().cpu()
                for window, one in zip(group, logits, strict=True):
                    found[window.clip].append((window, one))
            for clip in list(found)[:-1]:  # the last may have further windows
                yield clip, _joined(method, found.pop(clip), padding, length)
        for clip, parts in found.items():
            yield clip, _joined(method, parts, padding, length)
    for clip, reason in bad.items():
        log.warning("clip %s is left out: %s", task.keys[clip], reason)


def _heard(
    method: FineTuning,
    task: Task,
    clips: Sequence[int],
    settings: Testing,
    is_windowed: bool,
    bad: dict[int, str],
    snr_db: float | None,
    bar: tqdm,
) -> Iterator[Piece]:
    layout = Layout.of(method.encoder, method.frontend, settings.overlap or 0.0)
    for clip in clips:
        bar.update()
        try:
            waveform = task.waveform(clip, method.frontend.rate_hz)
            if not len(waveform) or not np.isfinite(waveform).all():
                raise AudioError("no samples" if not len(waveform) else "NaN or Inf samples")
        except AudioError as error:
            bad[clip] = str(error)
            continue
        if snr_db is not None:
            waveform = add_noise(waveform, snr_db, clip=clip)
        samples = torch.from_numpy(np.ascontiguousarray(waveform, np.float32))
        if not is_windowed:
            yield Piece(clip, 0, samples, range(len(samples)), True)
        elif settings.overlap is None:
            start = max(len(samples) - layout.length, 0) // 2
            yield Piece(clip, start, samples[start : start + layout.length], range(layout.num_columns), True)
        else:
            yield from cut(clip, [samples], layout)


def _alike(windows: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Group windows of one length, so that none hears the padding of another."""
    for _, group in groupby(sorted(windows, key=lambda w: len(w.samples)), key=lambda w: len(w.samples)):
        yield list(group)


def _batch(windows: Sequence[Piece], length: int | None, padding: str, device: torch.device) -> Batch:
    samples = torch.stack([window.samples for window in windows])
    num_samples = samples.shape[1]
    if length is not None and num_samples < length:
        if padding == "cyclic":
            samples, num_samples = samples[:, torch.arange(length) % num_samples], length
        else:
            samples = functional.pad(samples, (0, length - num_samples))
    counts = torch.full((len(windows),), num_samples, dtype=torch.int64, device=device)
    return Batch(waveform=samples.to(device), num_samples=counts)


def _joined(
    method: FineTuning, parts: list[tuple[Piece, Tensor]], padding: str, length: int | None
) -> NDArray[np.float32]:
    """Make one of a clip's windows: their mean, or, of moments, what each window says of those it stands for."""
    parts = sorted(parts, key=lambda part: part[0].start)
    if parts[0][1].ndim == 1:
        return torch.stack([logits for _, logits in parts]).mean(0).numpy()
    joined = []
    for piece, logits in parts:
        heard = valid_frames(method.frontend, torch.tensor(len(piece.samples)))
        num_audio = int(audio_columns(method.encoder, heard, mask_padding=method.mask_padding))
        if len(piece.samples) == length:
            num_audio = len(logits)
        joined.append(logits[piece.columns.start : min(piece.columns.stop, max(num_audio, piece.start == 0))])
    return torch.cat(joined).numpy()
