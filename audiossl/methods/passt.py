"""Can a transformer that was trained on images learn to name sounds, fast, from patches it does not even see?

PaSST (arXiv 2110.05069) LEARNS FROM LABELS: it is no self-supervised method, and belongs beside the others as the
supervised measure of them. Patches overlap; in training whole rows and columns of patches, and single ones, are left
out ("patchout"), which makes the sequence short and the model robust. Time and frequency have learned positions of
their own, so that clips may be shorter.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from audiossl.augment import SpectrogramAugmentation, WaveformAugmentation
from audiossl.batch import Batch
from audiossl.encoder import Encoder, init_truncated_normal
from audiossl.errors import UserError
from audiossl.features.classifier import LinearHead, pool_tokens
from audiossl.masking import Patchout
from audiossl.noise import Noise
from audiossl.patches import grid_of
from audiossl.running.ranks import mean_of_all_ranks, sum_of_all_ranks
from audiossl.sound.frontend import beyond
from audiossl.sound.waveform import to_float

log = logging.getLogger(__name__)


class PaSST(nn.Module):
    """Train `encoder` and `head` to name what is heard, from labels: `batch.target` (B, num_classes) in [0, 1].

    Features are the mean of class and distillation token (`distilled: false`: the class token), logits the head of
    them. `position_frames` is the longest clip the positions reach, null for the front end's length; longer clips are
    cut, shorter ones take a random stretch of the positions in training and the first in evaluation. `stride_time`
    null is `stride`. `draws`: `published` leaves out and masks the same of all clips of a batch, `corrected` something
    else of each. Differs: the published distillation head, which no forward pass used, is left out; and a clip too
    long for the positions is cut before patchout draws its columns, where published training ran out of the table.
    """

    needs_labels = True

    def __init__(
        self,
        *,
        frontend: nn.Module,
        num_classes: int,
        patch: int,
        stride: int,
        stride_time: int | None,
        position_frames: int | None,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        distilled: bool,
        patchout_time: int,
        patchout_frequency: int,
        patchout_random: int,
        draws: Literal["published", "corrected"],
        gain_db: int,
        roll_samples: int,
        waveform_mixup: float,
        waveform_mixup_alpha: float,
        mask_bands: int,
        mask_frames: int,
        spectrogram_mixup_alpha: float | None,
    ):
        super().__init__()
        if draws not in ("published", "corrected"):
            raise UserError(f"model.draws={draws!r}: choose published or corrected")
        frames = frontend.frames if position_frames is None else position_frames
        if frames is None:
            raise UserError("frontend.seconds and model.position_frames are both null: say how far positions reach")
        self.frontend = frontend
        per_clip = dict(per_clip=draws == "corrected")
        self.patchout = Patchout(time=patchout_time, frequency=patchout_frequency, single=patchout_random, **per_clip)
        waves = dict(mixup_probability=waveform_mixup, mixup_alpha=waveform_mixup_alpha)
        self.augment_waveform = WaveformAugmentation(gain_db=gain_db, roll_samples=roll_samples, **waves)
        masks = dict(widest_bands=mask_bands, widest_frames=mask_frames, fill=-frontend.centre / frontend.scale)
        mixup = dict(mixup_alpha=spectrogram_mixup_alpha)
        self.augment_spectrogram = SpectrogramAugmentation(**masks, **mixup, **per_clip)
        strides = (stride, stride if stride_time is None else stride_time)
        cut = dict(num_mels=frontend.num_mels, frames=frames, patch=(patch, patch), stride=strides)
        sizes = dict(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path)
        tokens = dict(positions="time+frequency", num_class_tokens=2 if distilled else 1, qkv_bias=True)
        self.encoder = Encoder(**cut, **sizes, **tokens)
        self.head = LinearHead(width, num_classes, pooling="class", norm="layer")
        self.apply(init_truncated_normal)
        heard = frames if frontend.frames is None else min(frontend.frames, frames)
        grid = grid_of(frontend.num_mels, heard, self.encoder.patch, self.encoder.stride)
        self.patchout.num_kept(grid)
        self.tokens_per_clip = grid[0] * grid[1]
        self._has_cut = False

    def forward(self, batch: Batch, *, generator: Noise) -> dict[str, Tensor]:
        """Return the `loss`, mean binary cross-entropy; augmented and with patches left out in training mode only."""
        if len(batch) == 0:  # every clip of the micro-batch was unreadable; DDP still wants a gradient everywhere
            nothing = 0.0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum().expand(0)
            return self._mean(nothing)
        if batch.target is None:
            raise UserError("model=passt learns from labels, and these clips have none")
        target, spectrogram = batch.target.float(), batch.spectrogram
        if spectrogram is None:
            spectrogram, target = self._hear(batch, target, generator)
        if not self.training:
            return self._mean(self.clip_losses(self.classify(spectrogram), target))
        spectrogram, target = self.augment_spectrogram(spectrogram, target, generator)
        spectrogram = self.cut(spectrogram)
        grid = self.encoder.grid_for(spectrogram)
        spare = self.encoder.grid[1] - grid[1]
        first_column = generator.randint(spare + 1) if spare else 0
        keep = self.patchout.keep(generator, grid)
        return self._mean(self.clip_losses(self.classify(spectrogram, keep, first_column), target))

    def _mean(self, losses: Tensor) -> dict[str, Tensor]:
        """Average (B,); in training over the clips of all ranks, with `weight` counting those."""
        if not self.training:
            return {"loss": losses.sum() / max(len(losses), 1)}
        total = sum_of_all_ranks(len(losses), losses.device)
        return {"loss": mean_of_all_ranks(losses, total), "weight": total}

    def logits(self, batch: Batch) -> Tensor:
        """Say how likely each class is, before the sigmoid: (B, num_classes). Nothing is drawn or left out."""
        spectrogram = batch.spectrogram
        if spectrogram is None:
            spectrogram = self.frontend(batch.waveform, batch.num_samples)
        return self.classify(spectrogram)

    def features(self, spectrogram: Tensor, keep: Tensor | None = None, first_column: int = 0) -> Tensor:
        """Describe (B, 1, F, T) by the mean of its class tokens: (B, D); `keep` (B, K) as for the encoder."""
        encoded = self.encoder(self.cut(spectrogram), keep, first_column=first_column)
        return pool_tokens(encoded, self.head.pooling, self.encoder.num_class_tokens)

    def classify(self, spectrogram: Tensor, keep: Tensor | None = None, first_column: int = 0) -> Tensor:
        """Turn (B, 1, F, T) into logits (B, num_classes)."""
        return self.head(self.features(spectrogram, keep, first_column))

    @classmethod
    def loss(cls, logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits with targets in [0, 1], both (B, C): the mean over clips and classes."""
        return cls.clip_losses(logits, target).mean()

    @staticmethod
    def clip_losses(logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits with targets in [0, 1], both (B, C): the mean over classes, (B,)."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)

    def cut(self, spectrogram: Tensor) -> Tensor:
        """Cut (B, 1, F, T) to what the positions reach; say so once."""
        cut = self.encoder.cut(spectrogram)
        frames, reach = spectrogram.shape[-1], cut.shape[-1]
        if reach < frames and not self._has_cut:
            self._has_cut = True
            log.warning("clips of %d frames are cut to %d, as far as positions reach", frames, reach)
        return cut

    def _hear(self, batch: Batch, target: Tensor, generator: Noise) -> tuple[Tensor, Tensor]:
        """Augment waveforms in training, and turn them into spectrograms (B, 1, F, T); returns targets with them.

        A clip that was rolled or mixed is audio from end to end: its padding is part of it, as published.
        """
        if not self.training:
            return self.frontend(batch.waveform, batch.num_samples, generator), target
        waveform = to_float(batch.waveform)
        if batch.num_samples is not None:
            waveform = waveform.masked_fill(beyond(batch.num_samples[:, None], waveform.shape[1]), 0.0)
        waveform, target = self.augment_waveform(waveform, target, generator)
        return self.frontend(waveform, None, generator), target
