"""How does a spectrogram become a sequence of tokens, and how does a token know where it lies?

A grid of rows (frequency) x columns (time) of small patches covers the spectrogram; each patch is one linear
projection. Fixed 2-D sine-cosine codes tell the cells apart: one half of the channels per axis. Patches as in ViT
(2010.11929), with overlap as in AST (2104.01778); the codes as in MAE (2111.06377) and Audio-MAE (2207.06405).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiossl.errors import UserError


def grid_of(num_mels: int, frames: int, patch: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Count rows and columns of patches. `patch` and `stride` are (mel bands, frames).

    Without overlap the patches must cover the spectrogram exactly; with overlap a remainder that is shorter than the
    stride is left out, as the published models do (1024 frames, stride 10: 101 columns).

    Raises `UserError` where the sizes do not fit; it names the nearest that do.
    """
    axes = (("frontend.num_mels", "mel bands", num_mels), ("frontend.seconds", "frames", frames))
    for (key, unit, size), extent, step in zip(axes, patch, stride, strict=True):
        if not 1 <= step <= extent:
            raise UserError(f"model.stride={step} must lie between 1 and model.patch={extent}")
        if size < extent:
            raise UserError(f"{key} gives {size} {unit}, shorter than one patch: model.patch={extent}")
        if step == extent and size % extent:
            below = size // extent * extent
            raise UserError(
                f"{key} gives {size} {unit}, which model.patch={extent} does not divide; "
                f"the nearest that fit are {below} and {below + extent} {unit}"
            )
    rows, columns = ((size - p) // s + 1 for size, p, s in zip((num_mels, frames), patch, stride, strict=True))
    return rows, columns


def patchify(spectrogram: Tensor, patch: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Cut (B, 1, F, T) into patches (B, N, P): frequency before time, both among patches and within one."""
    cells = spectrogram.unfold(2, patch[0], stride[0]).unfold(3, patch[1], stride[1])
    return rearrange(cells, "b 1 row column f t -> b (row column) (f t)")


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Lay patches (B, N, P) out as (B, 1, F, T); where patches overlap, average them.

    F and T are what the grid covers: a remainder that `patchify` left out does not come back.
    """
    if patch == stride:
        return rearrange(
            patches, "b (row column) (f t) -> b 1 (row f) (column t)", row=grid[0], column=grid[1], f=patch[0]
        )
    size = [(cells - 1) * s + p for cells, p, s in zip(grid, patch, stride, strict=True)]
    values = rearrange(patches, "b n p -> b p n")
    total = F.fold(values, size, kernel_size=patch, stride=stride)
    return total / F.fold(torch.ones_like(values), size, kernel_size=patch, stride=stride)


def normalise_patches(patches: Tensor) -> Tensor:
    """Give every patch (.., P) mean 0 and variance 1, unbiased, with an epsilon of 1e-6 inside the root.

    Source: Audio-MAE `models_mae.py`, `norm_pix_loss`; MAE.
    """
    return (patches - patches.mean(-1, keepdim=True)) / patch_std(patches)


def patch_std(patches: Tensor) -> Tensor:
    """Measure the standard deviation (.., 1) of every patch as `normalise_patches` does."""
    return (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def spread_from_visible(visible: Tensor, keep: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Guess mean and standard deviation of every patch (B, N, 1) from the visible ones (B, K, P) at keep (B, K).

    Weights fall with the fourth power of the distance; a step in frequency counts as two in time, because a band's
    level changes more slowly over time than over frequency. A visible patch gets its own.
    """
    rows, columns = grid
    cells = torch.arange(rows * columns, device=keep.device)
    places = torch.stack([2.0 * (cells // columns), 1.0 * (cells % columns)], dim=1)
    distance = torch.cdist(places.expand(len(keep), -1, -1), places[keep])
    weights = (distance + 1e-3) ** -4
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ visible.mean(-1, keepdim=True), weights @ patch_std(visible)


def sincos(places: Tensor, width: int) -> Tensor:
    """Encode places (N,) as (N, width) float64: sines, then cosines, of wavelengths from 2 pi to 10000 x 2 pi."""
    assert width % 2 == 0, f"{width} channels do not split into sines and cosines"
    frequencies = 10000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = places.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_table(
    grid: tuple[int, int], width: int, *, positions: Literal["published", "corrected"], overlapping: bool
) -> Tensor:
    """Build the table (rows, columns, D), in float64 rounded once to float32.

    `corrected`: the first half of the channels encodes the row (frequency), the second the column (time).

    `published`: what Audio-MAE's weights were trained with. Its table was made for (frequency, time) while its tokens
    run n = column * rows + row, so that the first half encodes n mod columns and the second n div columns: fixed and
    unique per cell, but not a code of frequency and time. Its overlapping patches were numbered right.
    """
    if width % 4:
        raise UserError(
            f"a width of {width} does not split into sines and cosines of two axes: make it a multiple of 4"
        )
    rows, columns = grid
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    first, second = row, column
    if positions == "published" and not overlapping:
        number = column * rows + row
        first, second = number % columns, number // columns
    codes = torch.cat([sincos(first, width // 2), sincos(second, width // 2)], dim=1)
    return codes.float().reshape(rows, columns, width)


class SinCosPositions(nn.Module):
    """Add the fixed code of its cell to every token; clips shorter than the table take its first columns.

    The table is a persistent buffer: an exported model carries the codes it was trained with.
    """

    table: Tensor

    def __init__(
        self, *, grid: tuple[int, int], width: int, positions: Literal["published", "corrected"], overlapping: bool
    ):
        super().__init__()
        if positions not in ("published", "corrected"):
            raise UserError(f"model.positions={positions!r}: choose published or corrected")
        self.register_buffer("table", sincos_table(grid, width, positions=positions, overlapping=overlapping))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (B, N, D) plus their positions; N must be whole columns of the table."""
        rows, columns, width = self.table.shape
        used, rest = divmod(tokens.shape[1], rows)
        assert rest == 0 and used <= columns, f"{tokens.shape[1]} tokens do not fit a table of {rows} x {columns}"
        return tokens + self.table[:, :used].reshape(1, -1, width).to(tokens.dtype)


class PatchEmbed(nn.Module):
    """Project every patch to a token: (B, 1, F, T) -> (B, N, D), N = row * columns + column."""

    def __init__(self, *, patch: tuple[int, int], stride: tuple[int, int], width: int):
        super().__init__()
        self.proj = nn.Conv2d(1, width, kernel_size=patch, stride=stride)
        # the published start: as if the convolution were the Linear that it is; its bias keeps PyTorch's
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))

    def forward(self, spectrogram: Tensor) -> Tensor:
        return rearrange(self.proj(spectrogram), "b d row column -> b (row column) d")
