"""How do two different pictures of the same sound come about?

Crops of the waveform, a quiet other sound mixed in, and a random part of the spectrogram stretched back to full size:
the augmentations of BYOL-A (arXiv 2103.06695) as ATST uses them (arXiv 2204.12076, 2306.04186). Each is a function of a
batch and of random numbers, every clip with its own, on the device and without a loop over clips.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from audiossl.noise import Noise
from audiossl.sound.frontend import beyond

CUBIC = -0.75  # the bicubic kernel's free constant, as torch.nn.functional.interpolate has it


def crop_starts(draw: Tensor, num_samples: Tensor, length: int) -> Tensor:
    """Draw where crops of `length` samples begin: draw (B,) in [0, 1), num_samples (B,) -> (B,) int64.

    Uniform in 0 .. num_samples - length, both included; 0 for a clip that is shorter.
    """
    room = (num_samples - length + 1).clamp(min=1)
    return (draw * room).long().minimum(room - 1)


def crop(waveform: Tensor, starts: Tensor, length: int, num_samples: Tensor | None = None) -> Tensor:
    """Cut `length` samples out of each clip: (B, S), starts (B,) -> (B, length), zeros behind a clip's end.

    `num_samples` (B,) says how much of each row is audio; None: all.
    """
    windows = functional.pad(waveform, (0, max(length - waveform.shape[1], 0))).unfold(1, length, 1)
    cut = windows[torch.arange(len(waveform), device=waveform.device), starts]
    return cut if num_samples is None else cut.masked_fill(beyond((num_samples - starts)[:, None], length), 0)


def log_mixup(foreground: Tensor, background: Tensor, share: Tensor, start: Tensor | None = None) -> Tensor:
    """Mix (B, 1, F, T) with (B, 1, F, T2): log(share * e^foreground + (1 - share) * e^background + eps).

    `share` (B,) is the foreground's. The values are what the front end returns, min-max-normalised decibels, so this is
    no sum of energies; so was it published. `start` (B,) is needed for unequal lengths: where the foreground's part
    begins in a longer background, or a shorter background in the foreground, the rest of which is mixed with nothing.
    """
    share = share[:, None, None, None]
    frames, others = foreground.shape[-1], background.shape[-1]
    if frames != others:
        assert start is not None, f"{frames} frames and {others}: say where to mix them"
        shift = start if others > frames else -start
        place = torch.arange(frames, device=start.device) + shift[:, None, None, None]
        is_mixed = (place >= 0) & (place < others)
        background = background.gather(3, place.clamp(0, others - 1).expand_as(foreground))
        share = torch.where(is_mixed, share, 1.0)
    mixed = share * foreground.exp() + (1 - share) * background.exp()
    return (mixed + torch.finfo(mixed.dtype).eps).log()


class MixupBank(nn.Module):
    """Remember the last `size` spectrograms, un-mixed, to mix them into later ones.

    The background gets up to `ratio` of the mixture. The store is made at the first `push`, follows the spectrograms'
    device and is never in the state dict: 2,000 of 64 x 1001 are 512 MB. `keys` are, so that a resumed run can rebuild
    the store by pushing the same clips in the same order: where in the ring an entry lies plays no part.

    Differs: published, each item is mixed with what came before it, its batch included, and each loader worker has a
    bank; here a batch is mixed with what was there before it, and each rank has one.
    """

    def __init__(self, *, size: int = 2000, ratio: float = 0.4):
        super().__init__()
        self.size, self.ratio = size, ratio
        self.clear()

    def __len__(self) -> int:
        return len(self._keys)

    def clear(self) -> None:
        """Forget everything."""
        self._store: Tensor | None = None
        self._keys: deque[str] = deque(maxlen=self.size)
        self._next = 0

    @property
    def num_bytes(self) -> int:
        """Count the bytes of the store, which has its full size from the first `push` on."""
        return 0 if self._store is None else self._store.numel() * self._store.element_size()

    def keys(self) -> list[str]:
        """List the keys of what is remembered, the oldest first."""
        return list(self._keys)

    @torch.no_grad()
    def push(self, spectrograms: Tensor, keys: list[str]) -> None:
        """Remember (B, 1, F, T) under B keys, in place of the oldest; every push has the same F and T."""
        assert len(spectrograms) == len(keys), f"{len(spectrograms)} spectrograms, {len(keys)} keys"
        newest = spectrograms[-self.size :, 0]
        if self._store is None:
            self._store = newest.new_empty(self.size, *newest.shape[1:])
        self._store = self._store.to(newest.device)
        slots = (torch.arange(len(newest), device=newest.device) + self._next) % self.size
        self._store.index_copy_(0, slots, newest)
        self._next = (self._next + len(newest)) % self.size
        self._keys.extend(keys)

    def mix(self, spectrograms: Tensor, alpha_draw: Tensor, entry_draw: Tensor) -> Tensor:
        """Mix (B, 1, F, T) with remembered ones, draws (B,) in [0, 1): the background's share, and which.

        With nothing remembered they pass as they are.
        """
        if not self._keys:
            return spectrograms
        known = len(self._keys)
        turn = (entry_draw * known).long().clamp(max=known - 1) + (self._next - known)
        background = self._store.to(spectrograms.device)[turn % self.size, None]
        return log_mixup(spectrograms, background, 1 - self.ratio * alpha_draw)


def _cubic_weights(fraction: Tensor) -> list[Tensor]:
    """Weigh the four neighbours of a point that lies `fraction` behind the second."""

    def near(x: Tensor) -> Tensor:
        return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC

    return [far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction)]


def _stretch(values: Tensor, first: Tensor, count: Tensor, axis: int) -> Tensor:
    """Resize `count` (B,) cells from `first` (B,) on to the whole `axis` (2 or 3) of (B, 1, F, T), corners aligned.

    Cells before 0 or behind the last are zero; neighbours outside the crop are its edge.
    """
    size = values.shape[axis]
    shape = (-1, 1, size, 1) if axis == 2 else (-1, 1, 1, size)
    step = (count - 1).to(values.dtype)[:, None] / max(size - 1, 1)
    place = step * torch.arange(size, device=values.device)
    left = place.long().minimum(count[:, None] - 1)
    stretched = torch.zeros_like(values)
    for neighbour, weight in enumerate(_cubic_weights(place - left)):
        cell = (left + neighbour - 1).clamp(min=0).minimum(count[:, None] - 1) + first[:, None]
        weight = weight.masked_fill((cell < 0) | (cell >= size), 0.0)
        taken = values.gather(axis, cell.clamp(0, size - 1).view(shape).expand_as(values))
        stretched.addcmul_(taken, weight.view(shape))
    return stretched


@dataclass(frozen=True)
class RandomResizedCrop:
    """Paste each clip into the centre of a canvas of zeros, cut out a random box, stretch it to the clip's size.

    `canvas_scale` (frequency, time) sizes the canvas, >= 1; a box is `frequency_scale` x `time_scale` (lowest, highest)
    of the clip's size, no larger than the canvas. The defaults are ATST-Clip's. Zero is where the front end's range has
    its middle, not silence; so was it published.
    """

    canvas_scale: tuple[float, float] = (1.0, 1.5)
    frequency_scale: tuple[float, float] = (0.6, 1.5)
    time_scale: tuple[float, float] = (0.6, 1.5)

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Give the size of the canvas for spectrograms of (F, T)."""
        return int(size[0] * self.canvas_scale[0]), int(size[1] * self.canvas_scale[1])

    def boxes(self, draw: Tensor, size: tuple[int, int]) -> Tensor:
        """Turn draws (B, 4) in [0, 1) into boxes (B, 4) int64: first row, first column, rows, columns of the canvas."""
        counts, firsts = [], []
        scales = (self.frequency_scale, self.time_scale)
        for axis, (cells, room, (low, high)) in enumerate(zip(size, self.canvas(size), scales, strict=True)):
            counts.append(((low + (high - low) * draw[:, axis]) * cells).long().clamp(1, room))
            places = room - counts[-1] + 1
            firsts.append((draw[:, 2 + axis] * places).long().minimum(places - 1))
        return torch.stack(firsts + counts, 1)

    def apply(self, spectrograms: Tensor, boxes: Tensor) -> Tensor:
        """Cut the boxes (B, 4) out and stretch them, bicubically with aligned corners: (B, 1, F, T) -> the same.

        Equals `torch.nn.functional.interpolate` on each crop by itself.
        """
        rows, columns = spectrograms.shape[2:]
        canvas = self.canvas((rows, columns))
        if (canvas[1], *self.time_scale) != (columns, 1, 1):  # else every box has all columns
            spectrograms = _stretch(spectrograms, boxes[:, 1] - (canvas[1] - columns) // 2, boxes[:, 3], 3)
        return _stretch(spectrograms, boxes[:, 0] - (canvas[0] - rows) // 2, boxes[:, 2], 2)

    def __call__(self, spectrograms: Tensor, generator: Noise) -> Tensor:
        """Draw a box for each clip and apply it."""
        return self.apply(spectrograms, self.boxes(generator.uniform(4), tuple(spectrograms.shape[2:])))


FREQUENCY_WARP = RandomResizedCrop(canvas_scale=(1.0, 1.0), time_scale=(1.0, 1.0))  # ATST-Frame's: time stays in place
