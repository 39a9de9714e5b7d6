"""Can a model that hears what happens when learn from one that hears what it is all about, or the other way round?

ATST-Clip sums a clip up in its class token, ATST-Frame describes every 40 ms; fine-tuned on labels they err
differently. A student of one kind learns from the labels and from what a fine-tuned, frozen teacher of the other kind
says of the same clip: C2F distils Clip into Frame, F2C Frame into Clip (2306.04186). LEARNS FROM LABELS. The order of
this file: a classifier of either kind, the method.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from audiossl.batch import Batch
from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.chunks import clip_features_in_chunks, frame_features_in_chunks
from audiossl.features.classifier import LinearHead
from audiossl.methods.atst import atst_encoder, projection_head
from audiossl.noise import Noise
from audiossl.running.ranks import mean_of_all_ranks, sum_of_all_ranks
from audiossl.weights.classifier import load_classifier


def features_of(encoder: Encoder, spectrogram: Tensor, num_frames: Tensor, chunk_frames: int | None) -> Tensor:
    """Describe clips for a head: (B, 1, F, T), num_frames (B,) -> class token and mean (B, 2 D), or the mean (B, D).

    Encoders with a class token are Clip's. Clips longer than `chunk_frames` are described in chunks, as published.
    """
    if encoder.num_class_tokens:
        how = dict(num_layers=1, with_mean=True, division="published")
        return clip_features_in_chunks(encoder, spectrogram, num_frames, chunk_frames=chunk_frames, **how)
    return frame_features_in_chunks(encoder, spectrogram, num_frames, chunk_frames=chunk_frames, num_layers=1)


class ATSTC2F(nn.Module):
    """Train a `student` (`encoder` and `head`) on labels and on the `teacher`'s logits.

    The loss is `distill_weight` (lambda) x BCE against the teacher's probabilities + the rest x BCE against
    `batch.target` (B, num_classes). With `project` what is distilled goes through a projector and a head of its own.
    `teacher` is a run's folder, its encoder.safetensors or the authors' fine-tuned file; null needs a weight of 0,
    which is plain fine-tuning and makes the teachers of others. `teacher_mode`: published keeps its batch statistics
    and drop path alive, corrected evaluates it. `teacher_chunk_frames` null: as long as it was trained with;
    `teacher_num_heads` is for an authors' file of an unpublished width.

    Raises `UserError` for a teacher that is missing or of another number of classes.
    """

    needs_labels, mask_padding = True, True

    def __init__(
        self,
        *,
        frontend: nn.Module,
        num_classes: int,
        student: Literal["frame", "clip"],
        patch: list[int],
        stride: list[int],
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        position_frames: int | None,
        teacher: str | None,
        teacher_mode: Literal["published", "corrected"],
        teacher_chunk_frames: int | None,
        teacher_num_heads: int | None,
        distill_weight: float,
        project: bool,
        projector_width: int,
    ):
        super().__init__()
        if (teacher is None) != (distill_weight == 0) or not 0 <= distill_weight <= 1:
            raise UserError(
                f"model.teacher={teacher or 'null'}, model.distill_weight={distill_weight}: a weight above 0, up to 1, "
                "needs a fine-tuned teacher, a weight of 0 none; to make one: model.student=clip model.teacher=null "
                "model.distill_weight=0"
            )
        sizes = dict(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias)
        cut = dict(patch=tuple(patch), stride=tuple(stride), drop_path=drop_path)
        self.frontend, self.distill_weight, self.teacher_mode = frontend, distill_weight, teacher_mode
        self.encoder = atst_encoder(frontend, position_frames, num_class_tokens=int(student == "clip"), **sizes, **cut)
        num_features, pooling = (2 * width, "class+mean") if student == "clip" else (width, "mean")
        self.head = LinearHead(num_features, num_classes, pooling=pooling)
        self.tokens_per_clip = self.encoder.grid[0] * (frontend.frames // self.encoder.stride[1])
        self.projector = self.distill_head = None
        if project:
            self.projector = projection_head(num_features, projector_width, num_features)
            self.distill_head = LinearHead(num_features, num_classes, pooling=pooling)
        self.teacher, self.chunk_frames, self.teacher_description = None, teacher_chunk_frames, {}
        if teacher is not None:
            self.teacher, trained_frames, self.teacher_description = load_classifier(
                teacher, num_classes=num_classes, num_heads=teacher_num_heads
            )
            self.teacher.requires_grad_(False)
            self.chunk_frames = teacher_chunk_frames or trained_frames

    def train(self, mode: bool = True) -> ATSTC2F:
        super().train(mode)
        if self.teacher is not None and self.teacher_mode == "corrected":
            self.teacher.eval()
        return self

    def forward(self, batch: Batch, *, generator: Noise) -> dict[str, Tensor]:
        """Return the `loss` and its parts, against labels and against the teacher."""
        spectrogram = self._spectrogram(batch)
        num_frames = torch.full((len(spectrogram),), spectrogram.shape[-1], device=spectrogram.device)
        return self.loss(spectrogram, num_frames, batch.target)

    def loss(self, spectrogram: Tensor, num_frames: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compare (B, 1, F, T), of which num_frames (B,) are audio, with target (B, C).

        In training `weight` counts the clips of all ranks, so that micro-batches can be weighed against each other.
        """
        features = features_of(self.encoder, spectrogram, num_frames, None)
        logits = self.head(features)  # once: batch statistics move with every call
        output = {"label_loss": self._mean(logits, target)}
        weight = {"weight": sum_of_all_ranks(len(logits), logits.device)} if self.training else {}
        if self.teacher is None:
            return {"loss": output["label_loss"], **weight}
        with torch.no_grad():
            said = self.teacher_logits(spectrogram, num_frames).sigmoid()
        distilled = logits if self.projector is None else self.distill_logits(features)
        output["distill_loss"] = self._mean(distilled, said)
        share = self.distill_weight
        return {"loss": share * output["distill_loss"] + (1 - share) * output["label_loss"], **output, **weight}

    def teacher_logits(self, spectrogram: Tensor, num_frames: Tensor) -> Tensor:
        """Ask the teacher: (B, C)."""
        return self.teacher.head(features_of(self.teacher.encoder, spectrogram, num_frames, self.chunk_frames))

    def distill_logits(self, features: Tensor) -> Tensor:
        """Say what is compared with the teacher: (B, D) -> (B, C)."""
        assert self.projector is not None, "without a projector they are the head's"
        return self.distill_head(self.projector(features))

    def logits(self, batch: Batch) -> Tensor:
        """Name what is heard: (B, C)."""
        spectrogram = self._spectrogram(batch)
        num_frames = torch.full((len(spectrogram),), spectrogram.shape[-1], device=spectrogram.device)
        return self.head(features_of(self.encoder, spectrogram, num_frames, None))

    def _spectrogram(self, batch: Batch) -> Tensor:
        if len(batch) == 0:  # every clip was unreadable; the ranks still have to meet in the batch statistics
            return self.frontend.window.new_zeros(0, 1, self.frontend.num_mels, self.frontend.frames)
        return self.frontend(batch.waveform, batch.num_samples)

    def _mean(self, logits: Tensor, target: Tensor) -> Tensor:
        by_clip = binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none").mean(1)
        return mean_of_all_ranks(by_clip) if self.training else by_clip.sum() / max(len(by_clip), 1)
