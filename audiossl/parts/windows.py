"""How can a decoder use that sounds are local in time and frequency?

Attention runs inside 4x4 windows of patches, and every other block shifts the windows so that neighbours mix.
Similarity is the cosine divided by a learned temperature, plus a bias that a small MLP derives from the log-spaced
offset of two cells: the Swin V2 block (2111.09883) as Audio-MAE's local decoder uses it (2207.06405).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from audiossl.errors import UserError
from audiossl.parts.blocks import Regional

NEVER = -100.0  # added to the logit of cells that only the roll made neighbours, as published


def check_windows(grid: tuple[int, int], window: int) -> None:
    """Raise `UserError` unless windows of `window` x `window` patches tile the grid."""
    if any(cells % window for cells in grid):
        raise UserError(
            f"model.decoder_window={window} does not divide the grid of {grid[0]} x {grid[1]} patches (mel x time): "
            "choose frontend.num_mels and frontend.seconds so that it does, or model.decoder=global"
        )


def shift_of(shift: Literal["time", "both", "none"], window: int) -> tuple[int, int]:
    """Translate the name of a shift into patches (rows, columns): half a window along the axes it names."""
    half = window // 2
    shifts = {"time": (0, half), "both": (half, half), "none": (0, 0)}
    if shift not in shifts:
        raise UserError(f"model.decoder_shift={shift!r}: choose time, both or none")
    return shifts[shift]


def shift_mask(grid: tuple[int, int], window: int, shift: tuple[int, int], device: torch.device | str) -> Tensor:
    """Find which cells of a window are no neighbours in truth: (windows, W, W), 0 or -100, W = window * window cells.

    After the roll the last window of a shifted axis holds both ends of it; cells see only those of their own end.
    """
    regions = []
    for cells, step in zip(grid, shift, strict=True):
        place = torch.arange(cells, device=device)
        regions.append((place >= cells - step).long())
    region = regions[0][:, None] * 2 + regions[1][None, :]
    region = rearrange(region, "(r wr) (c wc) -> (r c) (wr wc)", wr=window, wc=window)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, NEVER)


def log_offsets(window: int) -> Tensor:
    """List sign(d) ln(1 + |d|) of the offset d = query - key, (frequency, time), of all pairs of cells: (W * W, 2)."""
    cells = torch.cartesian_prod(torch.arange(window), torch.arange(window)).float()
    offsets = (cells[:, None] - cells[None]).flatten(0, 1)
    return offsets.sign() * offsets.abs().log1p()


class WindowAttention(nn.Module):
    """Attend within windows of (B, rows, columns, E)."""

    offsets: Tensor

    def __init__(self, *, width: int, num_heads: int, window: int, dropout: float):
        super().__init__()
        if width % num_heads:
            raise UserError(f"model.decoder_width={width} does not split into model.decoder_num_heads={num_heads}")
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.tau = nn.Parameter(torch.ones(num_heads))
        self.position_mlp = Mlp(2, 384, num_heads, act_layer=nn.ReLU, drop=dropout)
        self.register_buffer("offsets", log_offsets(window), persistent=False)

    def bias(self, mask: Tensor | None = None) -> Tensor:
        """Derive what position, and `mask` (windows, W, W), add to every logit: (1 or windows, H, W, W)."""
        cells = self.window**2
        bias = self.position_mlp(self.offsets).T.reshape(1, self.num_heads, cells, cells)
        return bias if mask is None else bias + mask[:, None]

    def forward(self, grid_tokens: Tensor, bias: Tensor) -> Tensor:
        """Return (B, rows, columns, E); `bias` as above is added to the logits."""
        rows, columns = (cells // self.window for cells in grid_tokens.shape[1:3])
        # windows are laid beside heads, so that one mask serves the whole batch without a copy per clip
        query, key, value = rearrange(
            self.qkv(grid_tokens),
            "b (r wr) (c wc) (three h d) -> three b (r c h) (wr wc) d",
            three=3,
            h=self.num_heads,
            wr=self.window,
            wc=self.window,
        )
        query = F.normalize(query, dim=-1) / self.tau.clamp(min=0.01).repeat(rows * columns)[:, None, None]
        bias = bias.expand(rows * columns, -1, -1, -1).flatten(0, 1)[None]
        mixed = F.scaled_dot_product_attention(
            query.to(value.dtype), F.normalize(key, dim=-1).to(value.dtype), value, bias.to(value.dtype), scale=1.0
        )
        mixed = rearrange(
            mixed, "b (r c h) (wr wc) d -> b (r wr) (c wc) (h d)", r=rows, c=columns, wr=self.window, wc=self.window
        )
        return self.proj(mixed)


class LocalBlock(Regional):
    """Mix the patches of each window, then each patch alone: x + LN(attention(x)), x + LN(MLP(x)), (B, N, E).

    `shift` (rows, columns) moves the windows. `dropout` acts inside the relative-position MLP only.
    """

    def __init__(
        self, *, width: int, num_heads: int, mlp_ratio: float, window: int, shift: tuple[int, int], dropout: float
    ):
        super().__init__()
        self.shift = shift
        self.attn = WindowAttention(width=width, num_heads=num_heads, window=window, dropout=dropout)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: Tensor, grid: tuple[int, int], mask: Tensor) -> Tensor:
        """Take `mask` from `shift_mask`; a block without shift does not use it."""
        return self.run(tokens, self.attn.bias(mask if any(self.shift) else None), grid)

    def body(self, tokens: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = tokens + self.norm1(self._attend(tokens.unflatten(1, grid), bias).flatten(1, 2))
        return tokens + self.norm2(self.mlp(tokens))

    def _attend(self, cells: Tensor, bias: Tensor) -> Tensor:
        if not any(self.shift):
            return self.attn(cells, bias)
        down, right = self.shift
        return self.attn(cells.roll((-down, -right), (1, 2)), bias).roll((down, right), (1, 2))
