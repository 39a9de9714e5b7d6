"""What turns patches into features?

A pre-norm vision transformer (2010.11929) over patch tokens and as many class tokens as a method wants. It has two
visible steps, `embed` (patches to tokens, no positions yet) and `encode` (positions, then what is kept, then the
blocks), so that methods which drop hidden patches and methods which replace them share it; it knows no method.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from audiossl.errors import UserError
from audiossl.masking import take
from audiossl.parts.blocks import ViTBlock
from audiossl.parts.droppath import RowDropPath
from audiossl.parts.positions import build_positions
from audiossl.patches import PatchEmbed, grid_of

PADDED = -10_000.0  # added to the attention to padding, as ATST's published code does


class Encoder(nn.Module):
    """Encode (B, 1, F, T) as (B, n + K, D), the n class tokens first.

    `frames` is the longest clip; shorter ones use the first columns of the position table. `patch` and `stride` are
    (mel bands, frames). `num_class_tokens` is 1 for Audio-MAE and ATST-Clip, 0 for ATST-Frame, 2 for PaSST (class and
    distillation). `drop_path` grows linearly from 0 at the first block to its value at the last. `final_norm` is false
    where the head normalises instead (fine-tuned Audio-MAE). Linear layers start Xavier-uniform; methods that want
    another start change it. `.geometry` rebuilds an equal encoder: `Encoder(**encoder.geometry)`.
    """

    def __init__(
        self,
        *,
        num_mels: int,
        frames: int,
        patch: tuple[int, int],
        stride: tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        positions: Literal["published", "corrected", "learned", "time+frequency"],
        drop_path: float,
        qkv_bias: bool = True,  # the defaults are for encoders exported before there was a choice
        num_class_tokens: int = 1,
        final_norm: bool = True,
    ):
        super().__init__()
        patch, stride = tuple(patch), tuple(stride)
        self.grid = grid_of(num_mels, frames, patch, stride)
        self.width, self.patch, self.stride, self.num_class_tokens = width, patch, stride, num_class_tokens
        self.geometry = dict(
            num_mels=num_mels,
            frames=frames,
            patch=list(patch),
            stride=list(stride),
            width=width,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            positions=positions,
            drop_path=drop_path,
            qkv_bias=qkv_bias,
            num_class_tokens=num_class_tokens,
            final_norm=final_norm,
        )
        self.patch_embed = PatchEmbed(patch=patch, stride=stride, width=width)
        table = dict(grid=self.grid, width=width, num_class_tokens=num_class_tokens)
        self.positions = build_positions(positions, **table, overlapping=stride != patch)
        self.class_token = nn.Parameter(torch.empty(1, num_class_tokens, width)) if num_class_tokens else None
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        sizes = dict(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias)
        self.blocks = nn.ModuleList(vit_block(**sizes, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6) if final_norm else nn.Identity()
        self.apply(init_linear)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)

    def grid_for(self, spectrogram: Tensor) -> tuple[int, int]:
        """Count rows and columns of the patches of (B, 1, F, T); raise `UserError` where it does not fit."""
        num_mels, frames = spectrogram.shape[-2:]
        grid = grid_of(num_mels, frames, self.patch, self.stride)
        if grid[0] != self.grid[0]:
            raise UserError(f"{num_mels} mel bands for a model of {self.geometry['num_mels']}: set frontend.num_mels")
        if grid[1] > self.grid[1]:
            raise UserError(
                f"{frames} frames for a model of at most {self.geometry['frames']}: cut it or set frontend.seconds"
            )
        return grid

    def cut(self, spectrogram: Tensor) -> Tensor:
        """Cut (B, 1, F, T) to what the positions reach; the same tensor where they reach all of it."""
        columns = grid_of(*spectrogram.shape[-2:], self.patch, self.stride)[1]
        if columns <= self.grid[1]:
            return spectrogram
        return spectrogram[..., : self.reach]

    @property
    def reach(self) -> int:
        """The frames that the columns of the position table cover."""
        return (self.grid[1] - 1) * self.stride[1] + self.patch[1]

    def embed(self, spectrogram: Tensor) -> Tensor:
        """Turn (B, 1, F, T) into tokens (B, N, D) without positions."""
        self.grid_for(spectrogram)
        return self.patch_embed(spectrogram)

    def encode(
        self, tokens: Tensor, keep: Tensor | None = None, *, valid: Tensor | None = None, first_column: int = 0
    ) -> Tensor:
        """Encode tokens (B, N, D), or those at keep (B, K): positions, selection, class tokens, blocks, norm.

        `valid` (B, N) bool says which tokens are audio: nothing attends to the others, None for all. `first_column`
        moves the clip along the position table. Returns (B, n + K, D), or (B, n + N, D).
        """
        return self.norm(self._blocks(self._select(tokens, keep, first_column), keep, valid)[-1])

    def encode_layers(
        self,
        tokens: Tensor,
        keep: Tensor | None = None,
        *,
        num_layers: int,
        valid: Tensor | None = None,
        first_column: int = 0,
        normed: bool = True,
    ) -> list[Tensor]:
        """Return what each of the last `num_layers` blocks gives, (B, n + K, D), `normed` with the final norm."""
        assert 1 <= num_layers <= len(self.blocks), f"{num_layers} of {len(self.blocks)} blocks"
        layers = self._blocks(self._select(tokens, keep, first_column), keep, valid, num_layers)
        return [self.norm(layer) if normed else layer for layer in layers]

    def forward(
        self, spectrogram: Tensor, keep: Tensor | None = None, *, valid: Tensor | None = None, first_column: int = 0
    ) -> Tensor:
        """Encode (B, 1, F, T) as `encode` does its patches; those that `keep` (B, K) leaves out are not embedded."""
        if keep is None:
            return self.encode(self.embed(spectrogram), valid=valid, first_column=first_column)
        rows, columns = self.grid_for(spectrogram)
        tokens = self.patch_embed(spectrogram, keep)
        tokens = self.positions(tokens, first_column, keep=keep, num_cells=rows * columns)
        return self.norm(self._blocks(tokens, keep, valid)[-1])

    def _select(self, tokens: Tensor, keep: Tensor | None, first_column: int) -> Tensor:
        tokens = self.positions(tokens, first_column)
        return tokens if keep is None else take(tokens, keep)

    def _blocks(self, tokens: Tensor, keep: Tensor | None, valid: Tensor | None, num_layers: int = 1) -> list[Tensor]:
        """Put class tokens before (B, K, D) and give what each of the last blocks makes of it."""
        if self.class_token is not None:
            table = self.positions.class_table  # all zeros in Audio-MAE's published one
            class_token = self.class_token if table is None else self.class_token + table
            tokens = torch.cat([class_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        mask, layers = self._mask(valid if keep is None or valid is None else valid.gather(1, keep), tokens.dtype), []
        for block in self.blocks:
            tokens = block(tokens, attn_mask=mask)
            layers = [*layers, tokens][-num_layers:]
        return layers

    def _mask(self, valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Say what is added to the attention to every token: (B, 1, 1, n + K)."""
        if valid is None:
            return None
        ignored = torch.nn.functional.pad(~valid, (self.num_class_tokens, 0), value=False)
        return (ignored.to(dtype) * PADDED)[:, None, None]


def vit_block(
    width: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0, *, qkv_bias: bool = True
) -> ViTBlock:
    """Build the pre-norm block that encoder and global decoder share: LN epsilon 1e-6, exact GELU."""
    if width % num_heads:
        raise UserError(f"a width of {width} does not split into {num_heads} heads: change width or num_heads")
    norm = partial(nn.LayerNorm, eps=1e-6)
    block = ViTBlock(width, num_heads, mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm)
    if drop_path:
        block.drop_path1, block.drop_path2 = RowDropPath(drop_path), RowDropPath(drop_path)
    return block


def init_linear(module: nn.Module) -> None:
    """Start a Linear as Audio-MAE does: Xavier-uniform weight, zero bias. Use with `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_truncated_normal(module: nn.Module) -> None:
    """Start a Linear or a patch projection as timm's ViT and ATST do: truncated normal of .02, zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
