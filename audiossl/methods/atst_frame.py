"""Can a model learn what happens when, by guessing what a teacher hears in frames that were hidden from it?

The student sees a clip with spans of its frames replaced by a learned token, the teacher sees all of it; the student
predicts the teacher's features at the hidden frames. One of the two views is augmented in frequency only, so that frame
k of both is the same 40 ms. ATST-Frame (2306.04186), after data2vec (2202.03555) and ATST-Clip.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from audiossl.batch import Batch
from audiossl.encoder import Encoder
from audiossl.methods.atst import TeacherStudent, atst_encoder
from audiossl.noise import Noise
from audiossl.parts.blockmask import SpanMasking
from audiossl.parts.positions import truncated_normal
from audiossl.parts.views import MixupBank, RandomResizedCrop
from audiossl.stepping.places import Places


class ATSTFrame(TeacherStudent):
    """Pre-train `encoder` to say of every frame what a teacher says that sees it.

    `mask_ratio` is the share of frames that spans of `mask_length` frames are drawn for; `mask_share` published lets
    them overlap, so that .65 hides about half, corrected hides that very share. `mask` random hides single frames,
    uniform spans of `mask_shortest` to 2 `mask_length` frames, disjoint spans that do not touch the same frame twice.
    `position_frames`, the memory and the ratio of mixup as in `ATSTClip`; `warp_frequency` is the share (lowest,
    highest) of the bands that is stretched to all of them.
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
        mask: Literal["block", "uniform", "random", "disjoint"],
        mask_ratio: float,
        mask_share: Literal["published", "corrected"],
        mask_length: int,
        mask_shortest: int,
        mixup_memory: int,
        mixup_ratio: float,
        warp_frequency: list[float],
    ):
        sizes = dict(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias)
        cut = dict(patch=tuple(patch), stride=tuple(stride), drop_path=drop_path)
        encoder = atst_encoder(frontend, position_frames, num_class_tokens=0, **sizes, **cut)
        heads = dict(projector_width=projector_width, projection_width=projection_width)
        super().__init__(frontend=frontend, encoder=encoder, **heads, momentum=momentum, symmetric=symmetric)
        self.mask_token = nn.Parameter(truncated_normal(1, 1, width))
        self.masking = SpanMasking(mask, mask_ratio, mask_length, mask_shortest, mask_share)
        self.warp = RandomResizedCrop((1.0, 1.0), tuple(warp_frequency), (1.0, 1.0))
        self.memory = nn.ModuleList([MixupBank(size=mixup_memory, ratio=mixup_ratio)])

    def forward(self, batch: Batch, *, generator: Noise) -> dict[str, Tensor]:
        """Return the `loss`, 2 - 2 cos of prediction and target, and how far features are from collapse."""
        views = self.views(batch, generator)
        rows, columns = self.encoder.grid_for(views[0])
        return self.loss(views, self.masking.draw(generator, rows * columns))

    def loss(self, views: list[Tensor], mask: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Predict the teacher's features of each view from the student's of the other, where `mask` (B, N) is True.

        Of the two views (B, 1, F, T) the first is the teacher's alone unless `symmetric`. `valid` (B, N) are the tokens
        that are audio; only they count.
        """
        targets = Places(mask if valid is None else mask & valid)
        for_student, for_teacher = (views, views) if self.symmetric else (views[1:], views[:1])
        student = [self.encode_masked(self.student.encoder, view, mask, valid) for view in for_student]
        with torch.no_grad():
            teacher = [self.encoder(view, valid=valid) for view in for_teacher]
        rows = (torch.cat([targets.take(tokens) for tokens in encoded]) for encoded in (student, teacher))
        return self.compare(*rows, len(views) if self.symmetric else 1)

    def encode_masked(self, encoder: Encoder, view: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
        """Encode (B, 1, F, T) with the mask token in place of patches where `mask` (B, N) is True: (B, N, D)."""
        tokens = encoder.embed(view)
        tokens = torch.where(mask[:, :, None], self.mask_token.to(tokens.dtype), tokens)
        return encoder.encode(tokens, valid=valid)

    @torch.no_grad()
    def views(self, batch: Batch, generator: Noise) -> list[Tensor]:
        """Make two views (B, 1, F, T) of the same crop: as it is, and mixed and warped (not so in evaluation)."""
        start, share, entry, box = (generator.uniform(number) for number in (1, 1, 1, 4))
        plain = self.cropped(batch, start[:, 0])
        if not self.training:
            return [plain, plain]
        memory = self.memory[0]
        mixed = memory.mix(plain, share[:, 0], entry[:, 0])
        memory.push(plain, batch.key)
        return [plain, self.warp.apply(mixed, self.warp.boxes(box, tuple(mixed.shape[2:])))]
