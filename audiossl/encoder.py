"""What turns patches into features?

A pre-norm vision transformer (2010.11929) over patch tokens and one class token. It has two visible steps, `embed`
(patches to tokens, no positions yet) and `encode` (positions, then what is kept, then the blocks), so that methods
which drop hidden patches and methods which replace them share it; it knows no method. Sizes as in Audio-MAE
(2207.06405).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from audiossl.errors import UserError
from audiossl.masking import take
from audiossl.patches import PatchEmbed, SinCosPositions, grid_of


class Encoder(nn.Module):
    """Encode (B, 1, F, T) as (B, 1 + K, D), the class token first.

    `frames` is the longest clip; shorter ones use the first columns of the position table. `patch` and `stride` are
    (mel bands, frames). `drop_path` grows linearly from 0 at the first block to its value at the last.
    `.geometry` rebuilds an equal encoder: `Encoder(**encoder.geometry)`.
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
        positions: Literal["published", "corrected"],
        drop_path: float,
    ):
        super().__init__()
        patch, stride = tuple(patch), tuple(stride)
        self.grid = grid_of(num_mels, frames, patch, stride)
        self.width, self.patch, self.stride = width, patch, stride
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
        )
        self.patch_embed = PatchEmbed(patch=patch, stride=stride, width=width)
        self.positions = SinCosPositions(grid=self.grid, width=width, positions=positions, overlapping=stride != patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        self.blocks = nn.ModuleList(vit_block(width, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_linear)
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

    def embed(self, spectrogram: Tensor) -> Tensor:
        """Turn (B, 1, F, T) into tokens (B, N, D) without positions."""
        self.grid_for(spectrogram)
        return self.patch_embed(spectrogram)

    def encode(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode tokens (B, N, D), or those at keep (B, K): positions, selection, class token, blocks, norm."""
        tokens = self._sequence(tokens, keep)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def encode_layers(self, tokens: Tensor, keep: Tensor | None = None, *, num_layers: int) -> list[Tensor]:
        """Return what each of the last `num_layers` blocks gives, (B, 1 + K, D), the final norm applied to each."""
        assert 1 <= num_layers <= len(self.blocks), f"{num_layers} of {len(self.blocks)} blocks"
        tokens, layers = self._sequence(tokens, keep), []
        for block in self.blocks:
            tokens = block(tokens)
            layers.append(tokens)
        return [self.norm(layer) for layer in layers[-num_layers:]]

    def forward(self, spectrogram: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.encode(self.embed(spectrogram), keep)

    def _sequence(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        tokens = self.positions(tokens)
        if keep is not None:
            tokens = take(tokens, keep)
        # the class token's position is all zeros in the published table
        class_token = self.class_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([class_token, tokens], dim=1)


def vit_block(width: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> Block:
    """Build the pre-norm block that encoder and global decoder share: biased qkv, LN epsilon 1e-6, exact GELU."""
    if width % num_heads:
        raise UserError(f"a width of {width} does not split into {num_heads} heads: change width or num_heads")
    norm = partial(nn.LayerNorm, eps=1e-6)
    return Block(width, num_heads, mlp_ratio, qkv_bias=True, drop_path=drop_path, norm_layer=norm)


def init_linear(module: nn.Module) -> None:
    """Start a Linear as Audio-MAE does: Xavier-uniform weight, zero bias. Use with `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
