"""What does an encoder say of a clip longer than the audio it was trained on?

The clip is cut into chunks as long as the model knows; each is encoded by itself, pooled into one vector per block, and
the vectors of the chunks that hold enough audio are averaged. As ATST's downstream code does it (2204.12076,
2306.04186); nothing here switches gradients off, so that a classifier can be trained through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from audiossl.encoder import Encoder

SHORTEST = 21  # frames below which ATST-Frame's published code drops a chunk


@dataclass(frozen=True)
class Chunk:
    """Hold what the blocks give for the same stretch of every clip of a batch."""

    layers: list[Tensor]  # (B, n + N, D) of each block, the final norm applied
    valid: Tensor  # (B, N) bool: the tokens that are audio
    remaining: Tensor  # (B,) int64: the tokens of audio from here to the clip's end
    is_kept: Tensor  # (B, 1) bool


def clip_features_in_chunks(
    encoder: Encoder,
    spectrogram: Tensor,
    num_frames: Tensor,
    *,
    chunk_frames: int | None,
    num_layers: int,
    with_mean: bool,
    division: Literal["published", "corrected"],
) -> Tensor:
    """Describe clips (B, 1, F, T) by class token and mean of the last blocks: (B, (1 or 2) * num_layers * D).

    First the class tokens of all blocks, then, `with_mean`, the means over the patch tokens of all blocks. `num_frames`
    (B,) is how much of each clip is audio; `chunk_frames` None takes the whole in one go. The first chunk always
    counts, a later one where more than half of it is audio.

    `division` published divides a chunk's sum by the number of all patches from there to the clip's end, so that the
    mean of every chunk but the last is too small (x .6 for 10 s in chunks of 6 s); corrected divides by the chunk's.
    """
    assert encoder.num_class_tokens, "an encoder without class token: take frame_features_in_chunks"
    assert division in ("published", "corrected"), division
    features, is_kept = [], []
    for chunk in chunks_of(encoder, spectrogram, num_frames, chunk_frames, num_layers):
        count = chunk.remaining if division == "published" else chunk.valid.sum(1)
        parts = [layer[:, 0] for layer in chunk.layers]
        parts += [mean_of_valid(layer, chunk.valid, count) for layer in chunk.layers] if with_mean else []
        features.append(torch.cat(parts, dim=-1))
        is_kept.append(chunk.is_kept)
    return mean_of_kept(features, is_kept)


def frame_features_in_chunks(
    encoder: Encoder, spectrogram: Tensor, num_frames: Tensor, *, chunk_frames: int | None, num_layers: int
) -> Tensor:
    """Describe clips (B, 1, F, T) by the mean over the patch tokens of the last blocks: (B, num_layers * D).

    `num_frames` (B,) is how much of each clip is audio; `chunk_frames` None takes the whole in one go. The first chunk
    always counts, a later one where more than half of it is audio and it has more than 20 frames.
    """
    features, is_kept = [], []
    for chunk in chunks_of(encoder, spectrogram, num_frames, chunk_frames, num_layers, shortest=SHORTEST):
        means = [mean_of_valid(layer, chunk.valid, chunk.valid.sum(1)) for layer in chunk.layers]
        features.append(torch.cat(means, dim=-1))
        is_kept.append(chunk.is_kept)
    return mean_of_kept(features, is_kept)


def class_token_over_blocks(
    encoder: Encoder, spectrogram: Tensor, num_frames: Tensor, *, num_layers: int = 8
) -> Tensor:
    """Average the class token over the last blocks, before the final norm: (B, 1, F, T) -> (B, D).

    `num_layers` may exceed the encoder's depth. Source: ATST's `AST.forward` with `avg=True`.
    """
    tokens, num_layers = encoder.embed(spectrogram), min(num_layers, len(encoder.blocks))
    valid = valid_tokens(encoder, num_frames.to(spectrogram.device), encoder.grid_for(spectrogram))
    layers = encoder.encode_layers(tokens, num_layers=num_layers, valid=valid, normed=False)
    return torch.stack([layer[:, 0] for layer in layers]).mean(0)


def chunks_of(
    encoder: Encoder,
    spectrogram: Tensor,
    num_frames: Tensor,
    chunk_frames: int | None,
    num_layers: int,
    shortest: int = 1,
) -> Iterator[Chunk]:
    """Encode (B, 1, F, T) chunk by chunk; what cannot count in any clip is left out.

    The published code makes one chunk more than there are full ones, be it empty; a chunk no longer than half of
    `chunk_frames` counts in no clip.
    """
    frames = spectrogram.shape[-1]
    step = chunk_frames or frames
    num_frames = num_frames.to(spectrogram.device)
    for start in range(0, frames, step):
        piece = spectrogram[..., start : start + step]
        if start and piece.shape[-1] <= max(step // 2, shortest - 1):
            continue
        rows, columns = encoder.grid_for(piece)
        remaining = (num_frames - start).clamp(min=0)
        valid = valid_tokens(encoder, remaining, (rows, columns))
        layers = encoder.encode_layers(encoder.embed(piece), num_layers=num_layers, valid=valid)
        is_kept = remaining > step // 2 if start else torch.ones_like(remaining, dtype=torch.bool)
        yield Chunk(layers, valid, rows * whole_columns(encoder, remaining), is_kept[:, None])


def whole_columns(encoder: Encoder, num_frames: Tensor) -> Tensor:
    """Count the columns of patches that `num_frames` (B,) fill: (B,)."""
    return ((num_frames - encoder.patch[1]) // encoder.stride[1] + 1).clamp(min=0)


def valid_tokens(encoder: Encoder, num_frames: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mark the tokens of a grid (rows, columns) that lie within the first `num_frames` (B,) frames: (B, N) bool."""
    rows, columns = grid
    is_audio = torch.arange(columns, device=num_frames.device) < whole_columns(encoder, num_frames)[:, None]
    return is_audio.repeat(1, rows)


def mean_of_valid(tokens: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Add up the last N of tokens (B, n + N, D) where `valid` (B, N), and divide by count (B,) + 1e-6: (B, D)."""
    patches = tokens[:, tokens.shape[1] - valid.shape[1] :]
    return (patches * valid[:, :, None]).sum(1) / (count[:, None] + 1e-6)


def mean_of_kept(features: list[Tensor], is_kept: list[Tensor]) -> Tensor:
    """Average the chunks' features (B, X) over those kept, each (B, 1) bool."""
    weights = torch.stack(is_kept)
    return (torch.stack(features) * weights).sum(0) / weights.sum(0)
