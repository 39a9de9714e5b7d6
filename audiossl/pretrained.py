"""What does one hold in hand after loading a trained encoder?

The encoder, the front end it was trained with, the head if it learned from labels, and a description that says where
all of it comes from: nothing is left to guess, and nothing can be mixed up.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.chunks import valid_tokens
from audiossl.features.classifier import LinearHead, pool_tokens
from audiossl.scoring.pooling import AttentionWeights, WeakPooling, pool_moments
from audiossl.spectrogram import resample
from audiossl.weights.hub import HubModel

if TYPE_CHECKING:
    from audiossl.embeddings import Embeddings


class PretrainedEncoder(HubModel, nn.Module):
    """Hold a trained `encoder`, its `frontend`, its `head` (None without one) and their `description`.

    `model(waveform, rate_hz)` gives tokens (B, n + N, D), the n class tokens first, from waveform (B, S) in [-1, 1] at
    any rate; clips longer than the model's length are cut to it, shorter ones padded as in training. `labels` names
    the head's classes where they are known; `attention` weighs the moments of a head that learned so when things happen
    from labels of clips. With `mask_padding` nothing attends to padding (ATST); the others hear it.
    `save_pretrained(folder)`, `push_to_hub(repo_id)` and `from_pretrained(source)` are those of the HuggingFace hub.
    """

    def __init__(
        self,
        encoder: Encoder,
        frontend: nn.Module,
        head: LinearHead | None,
        description: dict[str, Any],
        attention: AttentionWeights | None = None,
    ):
        super().__init__()
        self.encoder, self.frontend, self.head, self.description = encoder, frontend, head, description
        self.attention = attention

    @property
    def width(self) -> int:
        """D, the size of a token."""
        return self.encoder.width

    @property
    def rate_hz(self) -> int:
        """The rate the model hears at; other rates are resampled to it."""
        return self.frontend.rate_hz

    @property
    def labels(self) -> list[str] | None:
        """The names of the classes, in the order of the logits."""
        return self.description.get("vocabulary")

    @property
    def mask_padding(self) -> bool:
        """Whether attention leaves padding out."""
        return self.description.get("mask_padding", False)

    def forward(self, waveform: Tensor, rate_hz: int) -> Tensor:
        return self.encoder(self.frontend(resample(waveform, rate_hz, self.rate_hz)))

    def tokens(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Encode (B, 1, F, T), of which `num_frames` (B,) are audio, None for all: (B, n + N, D)."""
        return self.encoder(spectrogram, valid=self._valid(spectrogram, num_frames) if self.mask_padding else None)

    def layers(self, spectrogram: Tensor, num_frames: Tensor | None = None, *, num_layers: int) -> list[Tensor]:
        """Encode as `tokens` does; give each of the last `num_layers` blocks, with the final norm: (B, n + N, D)."""
        valid = self._valid(spectrogram, num_frames) if self.mask_padding else None
        tokens = self.encoder.embed(spectrogram.to(self.encoder.patch_embed.proj.weight.dtype))
        return self.encoder.encode_layers(tokens, num_layers=num_layers, valid=valid)

    def embed(self, waveform: Tensor | NDArray | str | Path, sample_rate: int | None = None, **choices) -> Embeddings:
        """Describe clips (S,) or (B, S), or a file, of any length and rate: vectors of the whole and of every moment.

        `model.embed("clip.wav").clip` is (1, D'). What can be chosen (layers, pooling, overlap of windows, ...) is
        said at `audiossl.embeddings.embed`.
        """
        from audiossl.embeddings import embed

        return embed(self, waveform, sample_rate, **choices)

    def logits(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Score the classes of (B, 1, F, T): (B, C), or (B, T', C) of a head for moments.

        Raises `UserError` where there is no head.
        """
        if self.head is None:
            raise UserError("this encoder has no classifier: it was trained without labels, or exported without one")
        return self.head(self._features(spectrogram, num_frames))

    @property
    def weak_pooling(self) -> WeakPooling:
        """How the moments of a head were pooled in training, to make a clip's probability; none for other heads."""
        said = self.description.get("weak_pooling", "none")
        return "none" if said == "attention" and self.attention is None else said  # an older export lacks it

    def clip_logits(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Score the classes of whole clips, (B, C): a head's for clips, or moments pooled as `weak_pooling` says.

        Raises `UserError` where there is no head.
        """
        if self.head is None or self.head.pooling != "columns":
            return self.logits(spectrogram, num_frames)
        features = self._features(spectrogram, num_frames)
        heard = torch.full((len(spectrogram),), spectrogram.shape[-1]) if num_frames is None else num_frames
        how = dict(features=features, attention=self.attention)
        probabilities, stride = self.head(features).sigmoid(), self.encoder.stride[1]
        return pool_moments(self.weak_pooling, probabilities, heard, stride, **how).logit(eps=1e-7)

    def _features(self, spectrogram: Tensor, num_frames: Tensor | None) -> Tensor:
        tokens = self.tokens(spectrogram, num_frames)
        valid, rows = self._valid(spectrogram, num_frames) if self.mask_padding else None, self.encoder.grid[0]
        return pool_tokens(tokens, self.head.pooling, self.encoder.num_class_tokens, valid, num_rows=rows)

    def _valid(self, spectrogram: Tensor, num_frames: Tensor | None) -> Tensor | None:
        if num_frames is None:
            return None
        return valid_tokens(self.encoder, num_frames.to(spectrogram.device), self.encoder.grid_for(spectrogram))
