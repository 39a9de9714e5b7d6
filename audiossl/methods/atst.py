"""Can a model learn to hear by guessing what its own past self hears in another part of the same clip?

Two views of a clip are encoded by a student and by a teacher; the student predicts what the teacher makes of the
other view. The teacher is the moving average of the student and gets no gradient. ATST-Clip (2204.12076), after BYOL
(2006.07733) and BYOL-A (2103.06695). The order of this file: what all of ATST's methods share, then ATST-Clip.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from audiossl.batch import Batch
from audiossl.ema import update_teacher
from audiossl.encoder import Encoder, init_truncated_normal
from audiossl.errors import UserError
from audiossl.noise import Noise
from audiossl.parts.batchnorm import BatchNorm1d
from audiossl.parts.health import Spectrum, feature_std
from audiossl.parts.views import MixupBank, RandomResizedCrop, crop, crop_starts
from audiossl.running.ranks import mean_of_all_ranks
from audiossl.schedules import momentum_at


def projection_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """Build a projector or predictor: two linear layers without bias, batch norm and ReLU between, none behind."""
    layers = nn.Linear(width, hidden, bias=False), BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False)
    return nn.Sequential(*layers)


def atst_encoder(frontend: nn.Module, position_frames: int | None, *, num_class_tokens: int, **sizes: Any) -> Encoder:
    """Build the encoder of ATST: learned positions for `position_frames`, truncated-normal start."""
    if frontend.frames is None:
        raise UserError("frontend.seconds=null: ATST needs views of a fixed length, frontend.seconds=6.01 for example")
    frames = position_frames or frontend.frames
    if frames < frontend.frames:
        raise UserError(
            f"model.position_frames={frames}: less than the {frontend.frames} frames of frontend.seconds; raise it"
        )
    learned = dict(positions="learned", num_class_tokens=num_class_tokens)
    encoder = Encoder(num_mels=frontend.num_mels, frames=frames, **learned, **sizes)
    return encoder.apply(init_truncated_normal)


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Measure 2 - 2 cos of each row: (n, D), (n, D) -> (n,), from 0 to 4."""
    exact = torch.promote_types(prediction.dtype, torch.float32)
    pair = (functional.normalize(rows.to(exact), dim=-1) for rows in (prediction, target))
    return 2 - 2 * torch.mul(*pair).sum(-1)


class TeacherStudent(nn.Module):
    """Hold a student (encoder, projector, predictor) and its teacher, the moving average of encoder and projector.

    `momentum` is the share of its past that the teacher keeps at the first step; it rises to 1 as half a cosine. Batch
    statistics stay the teacher's own: it runs in training mode, as published. With `symmetric` each of the two views
    is predicted from the other, else the second from the first. `projector_width` is the hidden layer's,
    `projection_width` what comes out.
    """

    mask_padding = True  # downstream, as published

    def __init__(
        self,
        *,
        frontend: nn.Module,
        encoder: Encoder,
        projector_width: int,
        projection_width: int,
        momentum: float,
        symmetric: bool,
    ):
        super().__init__()
        self.frontend, self.momentum, self.symmetric = frontend, momentum, symmetric
        self.feature_dim = projection_width
        self.view_samples = frontend.samples_for(frontend.frames)
        self.tokens_per_clip = encoder.grid[0] * (frontend.frames // encoder.stride[1])
        projector = projection_head(encoder.width, projector_width, projection_width)
        predictor = projection_head(projection_width, projector_width, projection_width)
        for head in (projector, predictor):
            head.apply(init_truncated_normal)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": projector, "predictor": predictor})
        self.teacher = nn.ModuleDict({"encoder": deepcopy(encoder), "projector": deepcopy(projector)})
        self.teacher.requires_grad_(False)

    @property
    def encoder(self) -> Encoder:
        """The teacher's, which is better than the student's and is what was published."""
        return self.teacher.encoder

    @property
    def encoders(self) -> tuple[Encoder, Encoder]:
        """Both, for a start from given weights."""
        return self.teacher.encoder, self.student.encoder

    def remember(self, batch: Batch, *, generator: Noise) -> None:
        """Take in a batch as `forward` would, for later ones to be mixed with, and nothing else."""
        self.views(batch, generator)

    def after_step(self, step: int, max_steps: int) -> None:
        """Move the teacher towards the student when optimiser step `step` is done."""
        momentum = momentum_at(step, self.momentum, max_steps)
        for part in ("encoder", "projector"):
            update_teacher(self.teacher[part], self.student[part], momentum)

    def cropped(self, batch: Batch, draw: Tensor) -> Tensor:
        """Cut a view's length out of each waveform, where `draw` (B,) in [0, 1) says: (B, 1, F, T)."""
        if len(batch) == 0:  # every clip was unreadable; the ranks still have to meet in the batch statistics
            return self.frontend.window.new_zeros(0, 1, self.frontend.num_mels, self.frontend.frames)
        num_samples = batch.num_samples
        if num_samples is None:
            num_samples = torch.full_like(draw, batch.waveform.shape[1], dtype=torch.int64)
        starts = crop_starts(draw, num_samples, self.view_samples)
        left = (num_samples - starts).clamp(max=self.view_samples)
        return self.frontend(crop(batch.waveform, starts, self.view_samples, num_samples), left)

    def compare(self, student: Tensor, teacher: Tensor, num_views: int) -> dict[str, Tensor]:
        """Compare encoded rows, one view behind the other: (views * n, D) each -> `loss` and the features' health.

        The mean is taken over the rows of all ranks.
        """
        prediction = self.student.predictor(self.student.projector(student))
        with torch.no_grad():
            target = self.teacher.projector(teacher)
        if num_views == 2:  # the views are equally long: each meets the other's
            distance = cosine_distance(prediction, torch.cat(target.chunk(2)[::-1]))
        else:
            distance = cosine_distance(prediction, target)
        if not self.training:
            return {"loss": distance.mean() if len(distance) else distance.sum()}
        output = {"loss": mean_of_all_ranks(distance)}
        for name, rows in (("student", prediction.detach()), ("teacher", target)):
            output |= {f"{name}_std": feature_std(rows), f"{name}_rank": Spectrum.of(rows)}
        return output


class ATSTClip(TeacherStudent):
    """Pre-train `encoder` to say the same of two crops of a clip, by its class token.

    Each view is a crop of the waveform as long as the front end's frames, mixed with an earlier clip, then a random
    part of it stretched to full size. `position_frames` is the longest clip that the positions are for, null for the
    front end's. The last `mixup_memory` spectrograms are remembered, per view and rank; the foreground keeps at least 1
    - `mixup_ratio`. Scales are (lowest, highest) shares of the view; `crop_canvas` is (frequency, time).
    """

    def __init__(
        self,
        *,
        frontend: nn.Module,
        patch: list[int],
        stride: list[int],
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        position_frames: int | None,
        projector_width: int,
        projection_width: int,
        momentum: float,
        symmetric: bool,
        mixup_memory: int,
        mixup_ratio: float,
        crop_canvas: list[float],
        crop_frequency: list[float],
        crop_time: list[float],
    ):
        sizes = dict(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias)
        cut = dict(patch=tuple(patch), stride=tuple(stride), drop_path=drop_path)
        encoder = atst_encoder(frontend, position_frames, num_class_tokens=1, **sizes, **cut)
        heads = dict(projector_width=projector_width, projection_width=projection_width)
        super().__init__(frontend=frontend, encoder=encoder, **heads, momentum=momentum, symmetric=symmetric)
        self.crop_samples = math.ceil(self.view_samples / 0.6)  # published: views of 6 s from clips of 10 s
        self.resized_crop = RandomResizedCrop(tuple(crop_canvas), tuple(crop_frequency), tuple(crop_time))
        self.memory = nn.ModuleList(MixupBank(size=mixup_memory, ratio=mixup_ratio) for _ in range(2))

    def forward(self, batch: Batch, *, generator: Noise) -> dict[str, Tensor]:
        """Return the `loss`, 2 - 2 cos of prediction and target, and how far features are from collapse."""
        return self.loss(self.views(batch, generator))

    def loss(self, views: list[Tensor], valid: list[Tensor] | None = None) -> dict[str, Tensor]:
        """Predict the teacher's view from the student's: two of (B, 1, F, T), `valid` (B, N) tokens of each."""
        student = self._class_tokens(self.student.encoder, views, valid, slice(None) if self.symmetric else slice(1, 2))
        with torch.no_grad():
            teacher = self._class_tokens(self.encoder, views, valid, slice(None) if self.symmetric else slice(0, 1))
        return self.compare(student, teacher, 2 if self.symmetric else 1)

    def _class_tokens(self, encoder: Encoder, views: list[Tensor], valid: list[Tensor] | None, seen: slice) -> Tensor:
        return encoder(torch.cat(views[seen]), valid=None if valid is None else torch.cat(valid[seen]))[:, 0]

    @torch.no_grad()
    def views(self, batch: Batch, generator: Noise) -> list[Tensor]:
        """Make two views (B, 1, F, T) of each clip; in evaluation they are crops and nothing else."""
        return [self.view(batch, generator, memory) for memory in self.memory]

    def view(self, batch: Batch, generator: Noise, memory: MixupBank) -> Tensor:
        """Crop, turn into a spectrogram, mix, resize; what came in is remembered."""
        start, share, entry, box = (generator.uniform(number) for number in (1, 1, 1, 4))
        spectrogram = self.cropped(batch, start[:, 0])
        if not self.training:
            return spectrogram
        mixed = memory.mix(spectrogram, share[:, 0], entry[:, 0])
        memory.push(spectrogram, batch.key)
        return self.resized_crop.apply(mixed, self.resized_crop.boxes(box, tuple(mixed.shape[2:])))
