"""What does a head hear of a clip: one vector, or one for every moment?

Any encoder's tokens, pooled; clips longer than `chunk_frames` are encoded in chunks, as ATST's downstream code does it
(2204.12076, 2306.04186).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from audiossl.encoder import Encoder
from audiossl.features.chunks import (
    clip_features_in_chunks,
    frame_features_in_chunks,
    valid_tokens,
    whole_columns,
)
from audiossl.features.classifier import Pooling, pool_tokens


def describe(
    encoder: Encoder,
    spectrogram: Tensor,
    num_frames: Tensor | None,
    *,
    pooling: Pooling,
    keep: Tensor | None = None,
    first_column: int = 0,
    chunk_frames: int | None = None,
    division: Literal["published", "corrected"] = "corrected",
) -> Tensor:
    """Describe clips (B, 1, F, T) for a head: (B, D), (B, 2 D) of `class+mean`, or (B, T', D) of `columns`.

    `num_frames` (B,) is how much of each is audio: nothing attends to the rest, None for all. `keep` (B, K) are the
    patches to encode, whole columns of them for `columns`. A clip's chunks are averaged, with `division` as
    `clip_features_in_chunks` has it; a moment's vectors come one after the other.
    """
    frames = spectrogram.shape[-1]
    if chunk_frames is None or frames <= chunk_frames:
        return _whole(encoder, spectrogram, num_frames, pooling, keep, first_column)
    assert keep is None and not first_column, "chunks are encoded whole"
    if pooling == "columns":
        starts = range(0, frames - encoder.patch[1] + 1, chunk_frames)
        pieces = [(spectrogram[..., start : start + chunk_frames], start) for start in starts]
        heard = [None if num_frames is None else (num_frames - start).clamp(min=0) for _, start in pieces]
        parts = [_whole(encoder, piece, n, pooling) for (piece, _), n in zip(pieces, heard, strict=True)]
        return torch.cat(parts, dim=1)
    lengths = torch.full((len(spectrogram),), frames) if num_frames is None else num_frames
    how = dict(chunk_frames=chunk_frames, num_layers=1)
    if pooling == "mean":
        return frame_features_in_chunks(encoder, spectrogram, lengths, **how)
    return clip_features_in_chunks(
        encoder, spectrogram, lengths, **how, with_mean=pooling == "class+mean", division=division
    )


def _whole(
    encoder: Encoder,
    spectrogram: Tensor,
    num_frames: Tensor | None,
    pooling: Pooling,
    keep: Tensor | None = None,
    first_column: int = 0,
) -> Tensor:
    rows, columns = encoder.grid_for(spectrogram)
    valid = None if num_frames is None else valid_tokens(encoder, num_frames.to(spectrogram.device), (rows, columns))
    tokens = encoder(spectrogram, keep, valid=valid, first_column=first_column)
    if keep is not None:
        valid = None if valid is None else valid.gather(1, keep)
        rows = keep.shape[1] // columns
    return pool_tokens(tokens, pooling, encoder.num_class_tokens, valid, num_rows=rows)


def columns_of(encoder: Encoder, frames: int, chunk_frames: int | None) -> int:
    """Count the columns of patches that `describe` gives of a spectrogram of `frames`."""
    step = chunk_frames or frames
    pieces = [min(step, frames - start) for start in range(0, frames - encoder.patch[1] + 1, step)]
    return sum(int(whole_columns(encoder, torch.tensor(piece))) for piece in pieces)
