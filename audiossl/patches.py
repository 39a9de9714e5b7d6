"""How does a spectrogram become a sequence of tokens?

A grid of rows (frequency) x columns (time) of small patches covers the spectrogram; each patch is one linear
projection. Patches as in ViT (2010.11929), with overlap as in AST (2104.01778).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiossl.errors import UserError


def grid_of(num_mels: int, frames: int, patch: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Count rows and columns of patches. `patch` and `stride` are (mel bands, frames).

    Frames behind the last whole column are left out, as every published model does: 1001 frames make 250 columns of 4
    (ATST), 1024 make 101 at stride 10 (Audio-MAE). Bands must be covered exactly unless patches overlap.

    Raises `UserError` where the sizes do not fit; it names the nearest that do.
    """
    axes = (("frontend.num_mels", "mel bands", num_mels), ("frontend.seconds", "frames", frames))
    for (key, unit, size), extent, step in zip(axes, patch, stride, strict=True):
        if not 1 <= step <= extent:
            raise UserError(f"model.stride={step} must lie between 1 and model.patch={extent}")
        if size < extent:
            raise UserError(f"{key} gives {size} {unit}, shorter than one patch: model.patch={extent}")
    if stride[0] == patch[0]:
        check_tiled("frontend.num_mels", "mel bands", num_mels, patch[0])
    rows, columns = ((size - p) // s + 1 for size, p, s in zip((num_mels, frames), patch, stride, strict=True))
    return rows, columns


def check_tiled(key: str, unit: str, size: int, patch: int) -> None:
    """Raise `UserError` where patches of `patch` leave a remainder of `size`; it names the nearest that have none."""
    if size % patch:
        below = size // patch * patch
        raise UserError(
            f"{key} gives {size} {unit}, which model.patch={patch} does not divide; "
            f"the nearest that fit are {below} and {below + patch} {unit}"
        )


def patchify(spectrogram: Tensor, patch: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Cut (B, 1, F, T) into patches (B, N, P): frequency before time, both among patches and within one."""
    cells = spectrogram.unfold(2, patch[0], stride[0]).unfold(3, patch[1], stride[1])
    return rearrange(cells, "b 1 row column f t -> b (row column) (f t)")


def patches_at(spectrogram: Tensor, keep: Tensor, patch: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Cut only the patches at keep (B, K) out of (B, 1, F, T): (B, K, P), as `patchify` numbers and orders them."""
    cells = spectrogram[:, 0].unfold(1, patch[0], stride[0]).unfold(2, patch[1], stride[1])  # a view: nothing is copied
    clips = torch.arange(len(keep), device=keep.device)[:, None]
    return cells[clips, keep // cells.shape[2], keep % cells.shape[2]].flatten(2)


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


def patch_levels(patches: Tensor) -> Tensor:
    """Measure mean and standard deviation of every patch (.., P): (.., 2)."""
    return torch.cat([patches.mean(-1, keepdim=True), patch_std(patches)], dim=-1)


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


class PatchEmbed(nn.Module):
    """Project every patch to a token: (B, 1, F, T) -> (B, N, D), N = row * columns + column.

    With keep (B, K) those patches alone, (B, K, D): what patchout and masking leave out is not computed.
    """

    def __init__(self, *, patch: tuple[int, int], stride: tuple[int, int], width: int):
        super().__init__()
        self.proj = nn.Conv2d(1, width, kernel_size=patch, stride=stride)
        # the published start: as if the convolution were the Linear that it is; its bias keeps PyTorch's
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))

    def forward(self, spectrogram: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is None:
            return rearrange(self.proj(spectrogram), "b d row column -> b (row column) d")
        patches = patches_at(spectrogram, keep, self.proj.kernel_size, self.proj.stride)
        # no F.linear, for which DeepSpeed's stage 3 puts one of its own that rounds otherwise
        tokens = torch.addmm(self.proj.bias, patches.flatten(0, 1), self.proj.weight.flatten(1).t())
        return tokens.unflatten(0, keep.shape)
