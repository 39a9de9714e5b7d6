"""What does an encoder that was trained on long clips say of every moment of a recording, and of the whole?

One vector per column of patches, at the middle of its frames. Two ways of a recording longer than the model: ATST's,
chunks of the whole recording's log-mel (2306.04186, its embedding functions), and for models without published rules
(Audio-MAE, 2207.06405) windows that overlap by half, each column read where it has the most company. Both have the
two methods of `features.levels.LevelReader`: `moments` and `scenes`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from audiossl.errors import UserError
from audiossl.features.chunks import clip_features_in_chunks, valid_tokens
from audiossl.features.levels import free_length, in_batches
from audiossl.features.timestamps import scene_embedding, timestamp_embedding
from audiossl.pretrained import PretrainedEncoder
from audiossl.spectrogram import KaldiFbank


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
        encoder, frontend = model.encoder, free_length(model.frontend)
        frontend.frames = model.frontend.frames or encoder.geometry["frames"]
        self.model, self.frontend, self.batch_seconds = model, frontend, batch_seconds
        self.num_layers = check_layers(encoder, num_layers, 1)
        self.window_columns = encoder.grid_for(torch.empty(1, 1, frontend.num_mels, frontend.frames))[1]
        self.hop_columns = max(self.window_columns // 2, 1)
        self.moment_size = self.scene_size = self.num_layers * encoder.width

    def middles(self, columns: Tensor) -> Tensor:
        """Find the sample in the middle of every column's frames."""
        patch, stride = self.model.encoder.patch[1], self.model.encoder.stride[1]
        first = self.frontend.window_samples / 2 if isinstance(self.frontend, KaldiFbank) else 0  # others are centred
        return first + (columns * stride + (patch - 1) / 2) * self.frontend.hop_samples

    def moments(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Describe every column of (B, S) at the model's rate: (B, n, moment_size), and its middle (B, n) in ms.

        Columns whose middle lies behind the end are left out; the first always counts.
        """
        clips, samples = waveform.shape
        step = self.model.encoder.stride[1] * self.frontend.hop_samples
        columns = torch.arange(samples // step + 1, device=waveform.device)
        columns = columns[(self.middles(columns) <= samples) | (columns == 0)]
        later = max(len(columns) - self.window_columns, 0)
        num_windows = 1 + -(-later // self.hop_columns)
        length, hop = self.frontend.samples_for(self.frontend.frames), self.hop_columns * step
        padded = nn.functional.pad(waveform, (0, max((num_windows - 1) * hop + length - samples, 0)))
        windows = padded.unfold(1, length, hop)
        valid = (samples - hop * torch.arange(num_windows, device=waveform.device)).clamp(max=length)

        def take(places: slice) -> tuple[Tensor, Tensor]:
            numbers = torch.arange(places.start, places.stop, device=waveform.device)
            number = numbers % num_windows
            return windows[numbers // num_windows, number], valid[number]

        at_once = max(1, int(self.batch_seconds * self.frontend.rate_hz / length))
        described = in_batches(self.describe, take, clips * num_windows, at_once, device=waveform.device)
        window = ((columns - (self.window_columns - 1) / 2) / self.hop_columns).round().long()
        window = window.clamp(0, num_windows - 1)  # the one whose middle is nearest
        features = described.unflatten(0, (clips, num_windows))[:, window, columns - window * self.hop_columns]
        times = self.middles(columns) * (1000 / self.frontend.rate_hz)
        return features, times.float().expand(clips, -1)

    def scenes(self, waveform: Tensor) -> Tensor:
        """Describe recordings (B, S) at the model's rate as wholes: (B, scene_size)."""
        return self.moments(waveform)[0].mean(1)

    def describe(self, windows: tuple[Tensor, Tensor]) -> Tensor:
        """Describe the columns of windows (B, S), of which (B,) samples are audio: (B, columns, num_layers * D)."""
        waveform, num_samples = windows
        encoder, spectrogram = self.model.encoder, self.frontend(waveform, num_samples)
        num_frames = 1 + (num_samples - self.frontend.samples_for(1)).clamp(min=0) // self.frontend.hop_samples
        grid, valid = encoder.grid_for(spectrogram), None
        if self.model.mask_padding:
            valid = valid_tokens(encoder, num_frames, grid)
        layers = encoder.encode_layers(encoder.embed(spectrogram), num_layers=self.num_layers, valid=valid)
        patches = torch.cat(layers, dim=-1)[:, encoder.num_class_tokens :]
        return patches.unflatten(1, grid).mean(1)


def check_layers(encoder: nn.Module, num_layers: int | None, default: int) -> int:
    """Take the default, or what was asked for; raise `UserError` where the encoder has fewer blocks."""
    if num_layers is None:
        return default
    if not 1 <= num_layers <= len(encoder.blocks):
        raise UserError(f"num_layers={num_layers}: this encoder has {len(encoder.blocks)} blocks")
    return num_layers
