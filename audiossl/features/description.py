"""What does an encoder say of a clip, window by window, and how does that become one description?

Of the tokens of each window those columns are taken that it speaks for. Sums, maxima and features are put together
until the clip has ended; of a clip under way nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from audiossl.errors import UserError
from audiossl.features.windows import Layout, Windows, cut, speaks_for, windows_for
from audiossl.sound.audio import AudioError

if TYPE_CHECKING:
    from audiossl.pretrained import PretrainedEncoder

Pooling = Literal["mean", "max", "class", "class+mean"]
Layers = Literal["last"] | int | Sequence[int]
Rows = Literal["mean", "concat"]
NOT_FINITE = "features are not finite: are its samples far beyond [-1, 1]?"


@dataclass(frozen=True)
class Choice:
    """Say what is taken of an encoder; `embeddings.embed` explains each."""

    layers: Layers = "last"
    pooling: Pooling = "mean"
    rows: Rows = "mean"
    overlap: float = 0.5
    with_frames: bool = True

    def check(self, model: PretrainedEncoder) -> None:
        """Raise `UserError` for what cannot be meant, or the encoder does not have."""
        self.blocks(model)
        Layout.of(model.encoder, model.frontend, self.overlap)

    def blocks(self, model: PretrainedEncoder) -> list[int]:
        """Number the blocks that are read; raise `UserError` for what the encoder does not have."""
        depth, layers = len(model.encoder.blocks), self.layers
        layers = layers.tolist() if isinstance(layers, Tensor | np.ndarray | np.integer) else layers
        if self.pooling not in ("mean", "max", "class", "class+mean") or self.rows not in ("mean", "concat"):
            raise UserError(
                f"pooling={self.pooling} rows={self.rows}: mean, max, class or class+mean; rows are mean or concat"
            )
        if "class" in self.pooling and not model.encoder.num_class_tokens:
            raise UserError(f"pooling={self.pooling}: this encoder has no class token; take mean or max")
        if layers == "last":
            return [depth - 1]
        if isinstance(layers, int) and not isinstance(layers, bool) and 1 <= layers <= depth:
            return list(range(depth - layers, depth))
        if (
            isinstance(layers, list | tuple | range)
            and layers
            and all(block in range(-depth, depth) for block in layers)
        ):
            return [int(block) % depth for block in layers]
        raise UserError(
            f"layers={layers}: last, the number of last blocks (1 to {depth}), or [blocks], 0 to {depth - 1}"
        )


@dataclass
class Description:
    """Hold what is known of a clip so far: sums over its patches, their maximum, and its moments (T', D")."""

    sums: Tensor | float = 0.0
    classes: Tensor | float = 0.0
    peak: Tensor | None = None
    frames: list[Tensor] = field(default_factory=list)
    num_frames: int = 0

    def pooled(self, pooling: Pooling) -> Tensor:
        """Give the vector of the clip (D',)."""
        if pooling == "max":
            return self.peak.float()
        parts = ([self.classes] if "class" in pooling else []) + ([self.sums] if "mean" in pooling else [])
        return (torch.cat(parts) / self.num_frames).float()

    def all_frames(self) -> Tensor:
        """Give the features of every moment (T', D")."""
        return torch.cat(self.frames)


@torch.no_grad()
def described(
    model: PretrainedEncoder, sources: Iterable[Iterable[Tensor]], choice: Choice, batch_size: int
) -> Iterator[tuple[int, Description | AudioError]]:
    """Describe clips that come in blocks (S,) at the model's rate, each when it is through: its number and what came.

    A clip whose blocks end in an `AudioError`, or whose features are not finite, gives the error instead. The model
    must be in evaluation mode. Windows of several clips share a batch.
    """
    blocks, layout = choice.blocks(model), Layout.of(model.encoder, model.frontend, choice.overlap)
    failed: dict[int, AudioError] = {}
    open_clips: dict[int, Description] = {}

    def pieces():
        for number, source in enumerate(sources):
            try:
                yield from cut(number, source, layout)
            except AudioError as error:
                failed[number] = error

    reported: set[int] = set()
    for windows in windows_for(model.encoder, model.frontend, layout, pieces(), batch_size):
        for piece, part in zip(windows.pieces, _of_windows(model, windows, blocks, choice), strict=True):
            if piece.clip in failed:
                continue
            clip = _added(open_clips.pop(piece.clip, None), part)
            if not piece.is_last:
                open_clips[piece.clip] = clip
            elif clip.sums.isfinite().all() and clip.classes.isfinite().all():
                yield piece.clip, clip
            else:
                yield piece.clip, AudioError(NOT_FINITE)
        for number in failed.keys() - reported:
            open_clips.pop(number, None)
            reported.add(number)
            yield number, failed[number]
    for number in failed.keys() - reported:
        yield number, failed[number]


def _of_windows(model: PretrainedEncoder, windows: Windows, blocks: list[int], choice: Choice) -> Iterator[Description]:
    """Encode a batch of windows, and give the part that each has in its clip."""
    encoder = model.encoder
    rows, columns = encoder.grid_for(windows.spectrogram)
    is_taken = speaks_for(windows, encoder, mask_padding=model.mask_padding)
    layers = model.layers(windows.spectrogram, windows.valid_frames, num_layers=len(encoder.blocks) - min(blocks))
    tokens = torch.cat([layers[block - len(encoder.blocks)] for block in blocks], dim=-1).float()
    classes, patches = tokens.tensor_split([encoder.num_class_tokens], dim=1)
    patches = patches.unflatten(1, (rows, columns))
    frames = patches.mean(1) if choice.rows == "mean" else patches.transpose(1, 2).flatten(2)
    taken = is_taken.to(frames.device)
    counts = is_taken.sum(1)
    sums = (frames * taken[:, :, None]).sum(1, dtype=torch.float64).cpu()
    of_class = (classes.mean(1).double().cpu() if encoder.num_class_tokens else sums) * counts[:, None]
    highest = patches.amax(1) if choice.rows == "mean" else frames
    peaks = highest.masked_fill(~taken[:, :, None], -torch.inf).amax(1).cpu()
    frames = frames.cpu() if choice.with_frames else None
    for row, mask in enumerate(is_taken):
        kept = [] if frames is None else [frames[row, mask]]
        yield Description(sums[row], of_class[row], peaks[row], kept, int(counts[row]))


def _added(clip: Description | None, part: Description) -> Description:
    if clip is None:
        return part
    peak = clip.peak.maximum(part.peak)
    frames = clip.frames + part.frames if part.frames else clip.frames
    num_frames = clip.num_frames + part.num_frames
    return Description(clip.sums + part.sums, clip.classes + part.classes, peak, frames, num_frames)
