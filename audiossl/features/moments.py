"""What does an encoder that was trained on long clips say of every moment of a recording, and of the whole?

One vector per column of patches, at the middle of its frames. Two ways of a recording longer than the model: ATST's,
chunks of the whole recording's log-mel (2306.04186, its embedding functions), and for models without published rules
(Audio-MAE, 2207.06405) windows that overlap by half, each column read where it has the most company. Both have the
two methods of `features.levels.LevelReader`: `moments` and `scenes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audiossl.embeddings import Embeddings, as_clips, check_rate, embed, evaluating
from audiossl.errors import UserError
from audiossl.features.chunks import clip_features_in_chunks, frame_features_in_chunks
from audiossl.features.levels import free_length, in_batches
from audiossl.features.timestamps import scene_embedding, timestamp_embedding
from audiossl.pretrained import PretrainedEncoder
from audiossl.sound.waveform import resample


class ChunkReader(nn.Module):
    """Describe recordings by ATST's rules, from the last `num_layers` blocks, None for all as published.

    Moments are the tokens (num_layers * D); a scene is the mean of the chunks' (ATST-Frame), or class token and mean of
    each block (ATST-Clip, 2 * num_layers * D). `rules` published: a short last chunk weighs like a full one, sums are
    divided by more than was summed, moments are named by their start and drift by 10 ms in 10 s; corrected: chunks
    end with a patch, weigh as much as they hold, and a moment's time is its middle.
    """

    def __init__(
        self,
        model: PretrainedEncoder,
        *,
        num_layers: int | None = None,
        rules: Literal["published", "corrected"] = "corrected",
        batch_seconds: float = 160,
    ):
        super().__init__()
        if rules not in ("published", "corrected"):
            raise UserError(f"rules={rules}: choose published or corrected")
        encoder, self.frontend = model.encoder, free_length(model.frontend)
        self.model, self.rules, self.batch_seconds = model, rules, batch_seconds
        self.num_layers = check_layers(encoder, num_layers, len(encoder.blocks))
        frames, step = model.frontend.frames or encoder.geometry["frames"], encoder.stride[1]
        self.chunk_frames = frames if rules == "published" else frames // step * step
        self.moment_size = self.num_layers * encoder.width
        self.scene_size = self.moment_size * (2 if encoder.num_class_tokens else 1)

    def moments(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Describe every token of (B, S) at the model's rate: (B, n, moment_size), and its time (B, n) in ms."""
        hop_ms = 1000 * self.frontend.hop_samples / self.frontend.rate_hz
        rules = dict(chunk_frames=self.chunk_frames, num_layers=self.num_layers, hop_ms=hop_ms, timing=self.rules)

        times = []

        def describe(some: Tensor) -> Tensor:
            features, own = timestamp_embedding(self.model.encoder, self.mel(some), **rules)
            times.append(own[0])
            return features

        features = self.over_clips(describe, waveform)
        return features, times[0].clone().expand(len(features), -1)

    def scenes(self, waveform: Tensor) -> Tensor:
        """Describe recordings (B, S) at the model's rate as wholes: (B, scene_size)."""
        encoder, rules = self.model.encoder, dict(chunk_frames=self.chunk_frames, num_layers=self.num_layers)

        def describe(some: Tensor) -> Tensor:
            mel = self.mel(some)
            if not encoder.num_class_tokens:
                return scene_embedding(encoder, mel, **rules, weighting=self.rules)
            everything = torch.full((len(mel),), mel.shape[-1], device=mel.device)
            return clip_features_in_chunks(encoder, mel, everything, **rules, with_mean=True, division=self.rules)

        return self.over_clips(describe, waveform)

    def over_clips(self, describe, waveform: Tensor) -> Tensor:
        """Describe so many recordings at once that their chunks fit into memory."""
        chunk = min(self.frontend.samples_for(self.chunk_frames), waveform.shape[1])
        at_once = max(1, int(self.batch_seconds * self.frontend.rate_hz / max(chunk, 1)))
        return in_batches(describe, waveform.__getitem__, len(waveform), at_once, device=waveform.device)

    def mel(self, waveform: Tensor) -> Tensor:
        """Compute the log-mel (B, 1, F, T) of all of it; what is shorter than a patch is padded with zeros."""
        shortest = self.frontend.samples_for(self.model.encoder.patch[1])
        return self.frontend(nn.functional.pad(waveform, (0, max(shortest - waveform.shape[1], 0))))


class TokenReader(nn.Module):
    """Describe recordings by the mean over each column's patch tokens, of the last `num_layers` blocks side by side.

    A scene is the mean over all columns; padding, which short recordings get as in training, is no part of it.
    """

    def __init__(self, model: PretrainedEncoder, *, num_layers: int | None = None, batch_seconds: float = 40):
        super().__init__()
        self.model, self.frontend = model, model.frontend
        self.num_layers = check_layers(model.encoder, num_layers, 1)
        frames = model.frontend.frames or model.encoder.geometry["frames"]
        window = model.frontend.samples_for(frames) / model.rate_hz
        self.how = dict(layers=self.num_layers, batch_size=max(1, int(batch_seconds / window)))
        self.moment_size = self.scene_size = self.num_layers * model.width

    def moments(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Describe every column of (B, S) at the model's rate: (B, n, moment_size), and its middle (B, n) in ms."""
        found = embed(self.model, waveform, self.model.rate_hz, **self.how)
        times = (1000 * found.timestamps_seconds).float().to(waveform.device)
        return found.frames.to(waveform.device), times.expand(len(waveform), -1)

    def scenes(self, waveform: Tensor) -> Tensor:
        """Describe recordings (B, S) at the model's rate as wholes: (B, scene_size)."""
        found = embed(self.model, waveform, self.model.rate_hz, with_frames=False, **self.how)
        return found.clip.to(waveform.device)


def atst_features(
    model: PretrainedEncoder,
    waveform: Tensor | NDArray,
    sample_rate: int,
    *,
    num_samples: Tensor | Sequence[int] | None = None,
    num_layers: int = 12,
    rules: Literal["published", "corrected"],
) -> Embeddings:
    """Describe clips (S,) or (B, S) as ATST's downstream code does a frozen encoder's: `embed`'s result.

    Moments, times and `rules` are those of `ChunkReader`. `clip` is too where the encoder has a class token
    (B, 2 n D); of one without it is the mean over the chunks by the rules of ATST-Frame's linear evaluation (B, n D),
    which leave a last chunk out where HEAR's weigh it. The 80 dB of the log-mel count from the clip's own maximum, so
    that a clip is held whole; `embed` holds none. An encoder of fewer blocks than `num_layers` gives all.

    Raises `UserError` for samples that are not finite, and for none.
    """
    clips, found = as_clips(waveform, num_samples), []
    check_rate(sample_rate)
    reader = ChunkReader(model, num_layers=min(num_layers, len(model.encoder.blocks)), rules=rules)
    with evaluating(model, reader):
        for number, clip in enumerate(clips):
            if not len(clip) or not clip.isfinite().all():
                raise UserError(f"clip {number}: {'NaN or Inf samples' if len(clip) else 'no samples'}")
            found.append(_frozen(reader, clip[None].to(reader.frontend.window.device), int(sample_rate)))
    if not found:
        raise UserError("no clips: give at least one")
    frames, longest = [some[0].cpu() for _, some, _ in found], max(found, key=lambda some: some[2].shape[1])
    return Embeddings(
        torch.cat([some.cpu() for some, _, _ in found]),
        nn.utils.rnn.pad_sequence(frames, batch_first=True),
        longest[2][0].cpu().double() / 1000,
        torch.tensor([len(some) for some in frames]),
    )


@torch.no_grad()
def _frozen(reader: ChunkReader, waveform: Tensor, rate_hz: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give the vector of a clip (1, S), its moments and their times in ms."""
    waveform, encoder = resample(waveform, rate_hz, reader.model.rate_hz), reader.model.encoder
    if encoder.num_class_tokens:
        return reader.scenes(waveform), *reader.moments(waveform)
    mel, sizes = reader.mel(waveform), dict(chunk_frames=reader.chunk_frames, num_layers=reader.num_layers)
    clip = frame_features_in_chunks(encoder, mel, torch.tensor([mel.shape[-1]]), **sizes)
    return clip, *reader.moments(waveform)


def check_layers(encoder: nn.Module, num_layers: int | None, default: int) -> int:
    """Take the default, or what was asked for; raise `UserError` where the encoder has fewer blocks."""
    if num_layers is None:
        return default
    if not 1 <= num_layers <= len(encoder.blocks):
        raise UserError(f"num_layers={num_layers}: this encoder has {len(encoder.blocks)} blocks")
    return num_layers
