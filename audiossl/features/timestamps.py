"""What does an encoder say of every moment of a clip of any length, and of the clip as a whole?

Of every token: what its last blocks give, side by side. A clip longer than the model knows is encoded in chunks, one
after the other; of the whole, each chunk's mean is averaged. The rules of the embedding functions that come with
ATST-Frame (2306.04186), and what they miss put right.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from audiossl.encoder import Encoder
from audiossl.features.chunks import valid_tokens


def frame_features(
    encoder: Encoder, spectrogram: Tensor, num_frames: Tensor | None = None, *, num_layers: int
) -> Tensor:
    """Describe every token of clips (B, 1, F, T) by the last blocks, each with the final norm: (B, N, num_layers * D).

    `num_frames` (B,) is how much of each clip is audio, None for all of it: nothing attends to the rest, whose tokens
    come out all the same.
    """
    grid = encoder.grid_for(spectrogram)
    valid = None if num_frames is None else valid_tokens(encoder, num_frames.to(spectrogram.device), grid)
    layers = encoder.encode_layers(encoder.embed(spectrogram), num_layers=num_layers, valid=valid)
    return torch.cat(layers, dim=-1)[:, encoder.num_class_tokens :]


def scene_embedding(
    encoder: Encoder,
    spectrogram: Tensor,
    *,
    chunk_frames: int,
    num_layers: int,
    weighting: Literal["published", "corrected"],
) -> Tensor:
    """Describe clips (B, 1, F, T), all audio, by the mean of their chunks' means: (B, num_layers * D).

    `weighting` published gives a short last chunk the weight of a full one, and one too short for a patch counts as
    zeros: 1003 frames in chunks of 1001 halve the result. corrected weighs chunks by their tokens.
    """
    assert weighting in ("published", "corrected"), weighting
    pieces, means, weights = spectrogram.split(chunk_frames, dim=-1), [], []
    encoder.grid_for(pieces[0])
    for piece in pieces:
        if piece.shape[-1] >= encoder.patch[1]:
            features = frame_features(encoder, piece, num_layers=num_layers)
            weights.append(1 if weighting == "published" else features.shape[1])
            means.append(weights[-1] * features.sum(1) / (features.shape[1] + 1e-6))
        elif weighting == "published":
            weights.append(1)
            means.append(spectrogram.new_zeros(len(spectrogram), num_layers * encoder.width))
    return sum(means) / sum(weights)


def timestamp_embedding(
    encoder: Encoder,
    spectrogram: Tensor,
    *,
    chunk_frames: int,
    num_layers: int,
    hop_ms: float,
    timing: Literal["published", "corrected"],
) -> tuple[Tensor, Tensor]:
    """Describe every token of clips (B, 1, F, T), all audio: (B, N, num_layers * D), and its time (B, N) in ms.

    `timing` published counts the tokens up, `stride * hop_ms` each, from 0: their start, as if none were lost where a
    chunk is no multiple of a patch (10 ms for every 1001 frames). corrected gives the middle of a token's frames.

    Raises `UserError` for a clip shorter than a patch.
    """
    assert timing in ("published", "corrected"), timing
    pieces, (patch, stride) = spectrogram.split(chunk_frames, dim=-1), (encoder.patch[1], encoder.stride[1])
    encoder.grid_for(pieces[0])
    long_enough = [piece for piece in pieces if piece.shape[-1] >= patch]
    features = [frame_features(encoder, piece, num_layers=num_layers) for piece in long_enough]
    middles = [
        index * chunk_frames + (patch - 1) / 2 + stride * torch.arange(some.shape[1])
        for index, some in enumerate(features)
    ]
    together, middles = torch.cat(features, dim=1), torch.cat(middles)
    frames = middles if timing == "corrected" else stride * torch.arange(len(middles))
    return together, (frames * hop_ms).float().to(together.device).expand(len(together), -1)
