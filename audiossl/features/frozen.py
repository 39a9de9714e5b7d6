"""What did ATST's authors take of a frozen encoder?

The last blocks side by side, by their chunk rules (2204.12076, 2306.04186; `chunks`, `timestamps`): the log-mel is
taken of the whole clip, so that its 80 dB count from the clip's own maximum, and then cut into chunks. For numbers
beside the published ones; `embeddings.embed` is for everything else, and holds no whole clip.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audiossl.embeddings import Embeddings, as_clips, check_rate, evaluating
from audiossl.errors import UserError
from audiossl.features.chunks import clip_features_in_chunks, frame_features_in_chunks
from audiossl.features.timestamps import timestamp_embedding
from audiossl.pretrained import PretrainedEncoder
from audiossl.sound.waveform import resample


@torch.no_grad()
def atst_features(
    model: PretrainedEncoder,
    waveform: Tensor | NDArray,
    sample_rate: int,
    *,
    num_samples: Tensor | Sequence[int] | None = None,
    num_layers: int = 12,
    rules: Literal["published", "corrected"],
) -> Embeddings:
    """Describe clips (S,) or (B, S) as ATST's downstream code does, all of a clip at once: `embed`'s result.

    `clip`: of an encoder with a class token the class tokens of the last `num_layers` blocks, then the means of each
    over the patches, (B, 2 n D); of one without, the means, (B, n D). `frames` (B, T', n D) and their times are of
    chunks as long as the front end's spectrogram. `rules` published divides the means of long clips and counts times as
    the published code does (`chunks`, `timestamps`); corrected puts both right. An encoder of fewer blocks gives all.

    Raises `UserError` for samples that are not finite, and for none.
    """
    clips = as_clips(waveform, num_samples)
    check_rate(sample_rate)
    frontend = copy.copy(model.frontend)
    frontend.frames = None
    found = []
    with evaluating(model, frontend):
        for number, clip in enumerate(clips):
            if not len(clip) or not clip.isfinite().all():
                raise UserError(f"clip {number}: {'NaN or Inf samples' if len(clip) else 'no samples'}")
            at_rate = resample(clip[None].to(frontend.window.device), int(sample_rate), model.rate_hz)
            found.append(_of_clip(model, frontend(at_rate), min(num_layers, len(model.encoder.blocks)), rules))
    if not found:
        raise UserError("no clips: give at least one")
    frames = [some[0].cpu() for _, some, _ in found]
    longest = max(found, key=lambda some: some[2].shape[1])
    return Embeddings(
        torch.cat([some.cpu() for some, _, _ in found]),
        nn.utils.rnn.pad_sequence(frames, batch_first=True),
        longest[2][0].cpu().double() / 1000,
        torch.tensor([len(some) for some in frames]),
    )


def _of_clip(
    model: PretrainedEncoder, spectrogram: Tensor, num_layers: int, rules: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the vector of a clip (1, 1, F, T), its frames and their times in ms."""
    encoder, num_frames = model.encoder, torch.tensor([spectrogram.shape[-1]])
    sizes = dict(chunk_frames=model.frontend.frames or encoder.geometry["frames"], num_layers=num_layers)
    if encoder.num_class_tokens:
        clip = clip_features_in_chunks(encoder, spectrogram, num_frames, **sizes, with_mean=True, division=rules)
    else:
        clip = frame_features_in_chunks(encoder, spectrogram, num_frames, **sizes)
    hop_ms = 1000 * model.frontend.hop_samples / model.rate_hz
    return clip, *timestamp_embedding(encoder, spectrogram, **sizes, hop_ms=hop_ms, timing=rules)
