"""How does an encoder that has learned to listen learn to name what it hears?

A head is put on it, and both are trained on labels, by the recipe of Audio-MAE (2207.06405), PaSST (2110.05069), ATST
(2204.12076, 2306.04186) or a mixture of them: what is augmented, which patches are left out, how clips are pooled, what
is frozen, and whether a fine-tuned teacher has a say. LEARNS FROM LABELS. The order of this file follows a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from audiossl.batch import Batch
from audiossl.encoder import Encoder, init_truncated_normal
from audiossl.errors import UserError
from audiossl.features.classifier import LinearHead
from audiossl.noise import Noise
from audiossl.patches import grid_of
from audiossl.running.ranks import mean_of_all_ranks, sum_of_all_ranks
from audiossl.scoring.pooling import AttentionWeights, WeakPooling, pool_moments
from audiossl.sound.waveform import to_float
from audiossl.tuning.augmentation import Augmentation, Sounds, frames_of
from audiossl.tuning.describing import columns_of, describe
from audiossl.tuning.freezing import Freeze, freeze_parameters
from audiossl.tuning.hiding import Hiding
from audiossl.tuning.losses import Loss, clip_losses, distill_losses, frame_losses, probability_losses
from audiossl.tuning.settings import check_settings
from audiossl.tuning.teacher import Teacher

log = logging.getLogger(__name__)


class FineTuning(nn.Module):
    """Train an `encoder` and a `head` to name clips, or what happens at each moment of them (`level` frame).

    Clips have `batch.target` (B, C). Moments, a column of patches each, have `batch.frame_target` (B, T', C); clips
    without one teach by their `target`, if `weak_pooling` says how the moments' probabilities make the clip's, and
    weigh `weak_weight`. Targets are in [0, 1], NaN for unknown. `relabel`, if set, fills them in by key: it is called
    with the batch, the number of moments and their seconds (see `tuning.targets`).

    geometry: of the encoder. pooling: `class`, `mean`, `class+mean`, or `columns` for moments. head_norm, head_eps,
    head_std: batch (without weights), layer or none; its epsilon; the deviation its weights start from. final_norm,
    drop_path: in place of the geometry's, null for those. loss: bce, or ce of one label a clip, with label_smoothing.
    freeze: none, encoder, or that many blocks with all before them. mask_padding: nothing attends to padding.
    chunk_frames: longer clips are encoded in chunks, null for in one go, cut to what positions reach; chunk_division:
    how published ATST-Clip averages them, or corrected. random_positions: in training, shorter clips take any stretch
    of the position table (PaSST). teacher: a classifier, exported or the authors', whose probabilities weigh
    distill_weight against the labels; teacher_mode: published keeps its batch statistics and drop path alive;
    teacher_num_heads: for an authors' file of an unpublished width.

    Raises `UserError` for settings that do not go together.
    """

    needs_labels = True

    def __init__(
        self,
        *,
        frontend: nn.Module,
        num_classes: int,
        geometry: dict[str, Any],
        level: Literal["clip", "frame"],
        pooling: Literal["class", "mean", "class+mean", "columns"],
        head_norm: Literal["batch", "layer", "none"],
        head_eps: float,
        head_std: float,
        final_norm: bool | None,
        drop_path: float | None,
        loss: Loss,
        label_smoothing: float,
        freeze: Freeze,
        mask_padding: bool,
        chunk_frames: int | None,
        chunk_division: Literal["published", "corrected"],
        random_positions: bool,
        weak_pooling: WeakPooling,
        weak_weight: float,
        hiding: Hiding,
        augment: Augmentation,
        teacher: str | None,
        teacher_mode: Literal["published", "corrected"],
        teacher_num_heads: int | None,
        distill_weight: float,
    ):
        super().__init__()
        check_settings({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        self.frontend, self.level, self.pooling, self.mask_padding = frontend, level, pooling, mask_padding
        self.label_loss = dict(loss=loss, label_smoothing=label_smoothing)
        self.chunk = dict(chunk_frames=chunk_frames, division=chunk_division)
        self.hiding, self.augment, self.random_positions = hiding, augment, random_positions
        changes = dict(final_norm=final_norm, drop_path=drop_path)
        geometry = geometry | {name: value for name, value in changes.items() if value is not None}
        self.encoder = Encoder(**geometry)
        if geometry["positions"] in (
            "learned",
            "time+frequency",
        ):  # ATST's and PaSST's start, for training from scratch
            self.encoder.apply(init_truncated_normal)
        width = self.encoder.width * (2 if pooling == "class+mean" else 1)
        self.head = LinearHead(width, num_classes, pooling=pooling, norm=head_norm, eps=head_eps)
        nn.init.normal_(self.head.linear.weight, std=head_std)
        self.attention = AttentionWeights(width, num_classes) if weak_pooling == "attention" else None
        self.weak_pooling, self.weak_weight = weak_pooling, weak_weight
        self.frozen = freeze_parameters(self.encoder, freeze)
        is_taught, self.distill_weight = teacher is not None, distill_weight
        how = dict(num_classes=num_classes, mode=teacher_mode, num_heads=teacher_num_heads)
        self.teacher = Teacher(teacher, **how) if is_taught else None
        self.teacher_description = self.teacher.description if is_taught else {}
        grid = grid_of(frontend.num_mels, self.frames, self.encoder.patch, self.encoder.stride)
        hiding.check(grid)
        self.tokens_per_clip = grid[0] * grid[1]
        self.relabel: Callable[[Batch, int, float], Batch] | None = None
        self._has_cut = False
        self.train()

    @property
    def frames(self) -> int:
        """The frames of a clip: the front end's, or where that has none as far as positions reach."""
        return self.frontend.frames or self.encoder.geometry["frames"]

    @property
    def listening(self) -> dict[str, Any]:
        """How clips longer than a chunk are heard, and moments pooled: what an export must say beside the head."""
        about = {"chunk_frames": self.chunk["chunk_frames"], "chunk_division": self.chunk["division"]}
        return about | ({"weak_pooling": self.weak_pooling} if self.level == "frame" else {})

    @property
    def column_seconds(self) -> float:
        """The time from one moment to the next."""
        return self.encoder.stride[1] * self.frontend.hop_samples / self.frontend.rate_hz

    def train(self, mode: bool = True) -> FineTuning:
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def labelled(self, batch: Batch) -> Batch:
        """Fill in the targets that `relabel` knows."""
        if self.relabel is None:
            return batch
        spectrogram = batch.spectrogram
        frames = self.frontend.frames if spectrogram is None else spectrogram.shape[-1]
        if frames is None:
            frames = 1 + max(batch.waveform.shape[1] - self.frontend.samples_for(1), 0) // self.frontend.hop_samples
        reach = frames if self.chunk["chunk_frames"] else min(frames, self.encoder.reach)
        return self.relabel(batch, columns_of(self.encoder, reach, self.chunk["chunk_frames"]), self.column_seconds)

    def forward(self, batch: Batch, *, generator: Noise) -> dict[str, Tensor]:
        """Return the `loss`, and its parts where it has several; augmented, with patches left out, in training only."""
        clips = self._cut(self._hear(self.labelled(batch), generator))
        keep, first_column = None, 0
        if self.training and len(batch):
            grid = self.encoder.grid_for(clips.values[..., : self.chunk["chunk_frames"]])
            spare = self.encoder.grid[1] - grid[1]
            first_column = generator.randint(spare + 1) if self.random_positions and spare else 0
            keep = self.hiding.keep(generator, grid)
        return self.loss(clips, keep, first_column)

    def loss(self, clips: Sounds, keep: Tensor | None = None, first_column: int = 0) -> dict[str, Tensor]:
        """Compare spectrograms (B, 1, F, T) with their targets; `keep` (B, K) are the patches that are encoded.

        In training `weight` counts the clips of all ranks, so that micro-batches can be weighed against each other;
        those with events and those with labels alone, which are averaged apart, are weighed together.
        """
        features = self.features(clips, keep, first_column)
        logits = self.head(features)  # once: batch statistics move with every call
        losses = self._moments(clips, features, logits) if self.level == "frame" else self._clips(clips, logits)
        total = sum(losses.values())
        weight = {"weight": sum_of_all_ranks(len(clips.values), logits.device)} if self.training else {}
        if self.teacher is None:
            return {"loss": total} | (losses if len(losses) > 1 else {}) | weight
        said = self.teacher.logits(clips, mask_padding=self.mask_padding)
        distilled = self._mean(distill_losses(logits, said, self.label_loss["loss"]))
        share = self.distill_weight
        return {"loss": share * distilled + (1 - share) * total, "distill_loss": distilled, **losses, **weight}

    def features(self, clips: Sounds, keep: Tensor | None = None, first_column: int = 0) -> Tensor:
        """Describe spectrograms for the head: (B, D), or (B, T', D) for moments."""
        heard = clips.length.clamp(min=self.encoder.patch[1]) if self.mask_padding else None
        how = dict(pooling=self.pooling, keep=keep, first_column=first_column, **self.chunk)
        return describe(self.encoder, clips.values, heard, **how)

    def logits(self, batch: Batch) -> Tensor:
        """Say how likely each class is, before the sigmoid: (B, C), or (B, T', C) for moments. Nothing is drawn."""
        return self.head(self.features(self._cut(self._hear(batch, None))))

    def clip_logits(self, batch: Batch) -> Tensor:
        """Say how likely each class is in the clip, (B, C), also where the head scores moments."""
        clips = self._cut(self._hear(batch, None))
        features = self.features(clips)
        if self.level == "clip":
            return self.head(features)
        return self.pooled(clips, features, self.head(features).sigmoid()).logit(eps=1e-7)

    def pooled(self, clips: Sounds, features: Tensor, probabilities: Tensor) -> Tensor:
        """Pool the moments' probabilities (B, T', C) as `weak_pooling` says: (B, C)."""
        how = dict(features=features, attention=self.attention)
        return pool_moments(self.weak_pooling, probabilities, clips.length, self.encoder.stride[1], **how)

    def _hear(self, batch: Batch, generator: Noise | None) -> Sounds:
        """Turn the batch into spectrograms; in training augmented, and so are the targets."""
        if len(batch) == 0:  # every clip was unreadable; the ranks still have to meet in the batch statistics
            nothing = self.frontend.window.new_zeros(0, 1, self.frontend.num_mels, self.frames)
            target = nothing.new_zeros(0, self.head.linear.out_features)
            return Sounds(nothing, nothing.new_zeros(0, dtype=torch.int64), target, batch.frame_target)
        is_training, spectrogram = self.training and generator is not None, batch.spectrogram
        if spectrogram is None:
            wave = to_float(batch.waveform)
            length = torch.full((len(wave),), wave.shape[1], device=wave.device)
            length = length if batch.num_samples is None else batch.num_samples.to(wave.device)
            clips = Sounds(wave, length, batch.target, batch.frame_target)
            clips = self.augment.waveforms(clips, generator) if is_training else clips
            clips = frames_of(self.frontend, clips, self.frontend(clips.values, clips.length, generator))
        else:
            length = torch.full((len(spectrogram),), spectrogram.shape[-1], device=spectrogram.device)
            clips = Sounds(spectrogram, length, batch.target, batch.frame_target)
        return self.augment.spectrograms(clips, generator, self.frontend) if is_training else clips

    def _cut(self, clips: Sounds) -> Sounds:
        if self.chunk["chunk_frames"]:
            return clips
        values, frames = self.encoder.cut(clips.values), clips.values.shape[-1]
        if values.shape[-1] < frames and not self._has_cut:
            self._has_cut = True
            log.warning("clips of %d frames are cut to %d, as far as positions reach", frames, values.shape[-1])
        return replace(clips, values=values, length=clips.length.clamp(max=values.shape[-1]))

    def _clips(self, clips: Sounds, logits: Tensor) -> dict[str, Tensor]:
        if clips.target is None:
            raise UserError("fine-tuning learns from labels, and these clips have none")
        return {"label_loss": self._mean(clip_losses(logits, clips.target, **self.label_loss))}

    def _moments(self, clips: Sounds, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        losses, target = {}, clips.frame_target
        is_known = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        if target is not None:
            if target.shape != logits.shape:
                raise UserError(f"targets of {tuple(target.shape)} for moments and classes {tuple(logits.shape)}")
            is_known = ~target.isnan().flatten(1).all(1)
            losses["frame_loss"] = self._mean(frame_losses(logits, target), is_known)
        if self.weak_pooling != "none" and clips.target is not None:
            pooled = self.pooled(clips, features, logits.sigmoid())
            weak = self._mean(probability_losses(pooled, clips.target), ~is_known)
            losses["weak_loss"] = self.weak_weight * weak
        if not losses:
            raise UserError(
                "model.level=frame learns from events, and these clips have none; to learn from labels of whole clips "
                "take model.weak_pooling=attention"
            )
        return losses

    def _mean(self, by_clip: Tensor, counted: Tensor | None = None) -> Tensor:
        """Average (B,), in training over all ranks, or where `counted` (B,) says; without waiting for the device."""
        if counted is None:
            return mean_of_all_ranks(by_clip) if self.training else by_clip.sum() / max(len(by_clip), 1)
        by_clip, number = torch.where(counted, by_clip, 0.0), counted.sum()
        if self.training:
            return mean_of_all_ranks(by_clip, sum_of_all_ranks(number, by_clip.device))
        return by_clip.sum() / number.clamp(min=1)
