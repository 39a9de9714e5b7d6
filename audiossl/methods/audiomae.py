"""Can a model learn to hear by filling in what is hidden of a spectrogram?

Most patches are dropped; a transformer encodes the few that stay; a small decoder puts a learned token in every gap
and predicts the values of the hidden patches. What the encoder needs for that is what it learns. Audio-MAE
(2207.06405), after MAE (2111.06377). The order of this file: what the model predicts, the decoder, the method.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from audiossl.batch import Batch
from audiossl.encoder import Encoder, init_linear, vit_block
from audiossl.errors import UserError
from audiossl.masking import Masking, hidden, keep_to_mask, take
from audiossl.noise import Noise
from audiossl.parts.positions import SinCosPositions
from audiossl.parts.windows import LocalBlock, check_windows, shift_mask, shift_of
from audiossl.patches import check_tiled, normalise_patches, patch_levels, patchify, spread_from_visible, unpatchify
from audiossl.running.ranks import mean_of_all_ranks, sum_of_all_ranks

GLOBAL_BLOCKS_OF_HYBRID = 4  # paper: local layers first, the last four attend globally


class Decoder(nn.Module):
    """Predict patches from the encoded few.

    `global` blocks attend everywhere and see the class token; `local` ones attend in shifted windows without it;
    `hybrid` is local but for its last four blocks. Differs: the paper gives no code for hybrid; ours leaves the class
    token out of all its blocks, as the published local decoder does.
    """

    def __init__(
        self,
        *,
        decoder: Literal["global", "local", "hybrid"],
        encoder_width: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        window: int,
        shift: Literal["time", "both", "none"],
        dropout: float,
        grid: tuple[int, int],
        positions: Literal["published", "corrected"],
        overlapping: bool,
        num_values: int,
    ):
        super().__init__()
        num_local = num_local_blocks(decoder, depth)
        self.has_class_token = num_local == 0
        self.window, self.shift, self.overlapping = window, shift_of(shift, window), overlapping
        if num_local:
            check_windows(self._padded(grid), window)
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = SinCosPositions(grid=grid, width=width, positions=positions, overlapping=overlapping)
        sizes = dict(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio)
        local = [
            LocalBlock(**sizes, window=window, shift=self.shift if block % 2 else (0, 0), dropout=dropout)
            for block in range(num_local)
        ]
        self.blocks = nn.ModuleList(local + [vit_block(**sizes) for _ in range(depth - num_local)])
        self.num_local = num_local
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, num_values)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Turn encoded tokens (B, 1 + K, D), kept at (B, K), into decoded tokens of all patches (B, N, E)."""
        tokens = self.positions(self._fill(latent, keep, grid))
        if self.has_class_token:
            tokens = torch.cat([self.embed(latent[:, :1]), tokens], dim=1)
        tokens = self._local(tokens, grid) if self.num_local else tokens
        for block in self.blocks[self.num_local :]:
            tokens = block(tokens)
        return tokens[:, 1:] if self.has_class_token else tokens

    def values(self, tokens: Tensor) -> Tensor:
        """Predict patches (B, K, P) from decoded tokens (B, K, E)."""
        return self.predict(self.norm(tokens))

    def _fill(self, latent: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        shown = self.embed(latent[:, 1:])
        everywhere = self.mask_token.to(shown.dtype).expand(len(latent), grid[0] * grid[1], -1)
        return everywhere.scatter(1, keep[:, :, None].expand_as(shown), shown)

    def _local(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        padded = self._padded(grid)
        check_windows(padded, self.window)
        tokens = tokens.unflatten(1, grid)
        missing = padded[1] - grid[1]
        tokens = torch.cat([tokens, tokens[:, :, -1:].expand(-1, -1, missing, -1)], dim=2).flatten(1, 2)
        mask = shift_mask(padded, self.window, self.shift, tokens.device)
        for block in self.blocks[: self.num_local]:
            tokens = block(tokens, padded, mask)
        return tokens.unflatten(1, padded)[:, :, : grid[1]].flatten(1, 2)

    def _padded(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Repeat the last column until windows fit, for overlapping patches only, as published (101 columns -> 102)."""
        rows, columns = grid
        return (rows, columns + -columns % self.window) if self.overlapping else grid


def num_local_blocks(decoder: str, depth: int) -> int:
    """Count the blocks that attend within windows."""
    if decoder not in ("global", "local", "hybrid"):
        raise UserError(f"model.decoder={decoder!r}: choose global, local or hybrid")
    if decoder == "hybrid" and depth <= GLOBAL_BLOCKS_OF_HYBRID:
        raise UserError(
            f"model.decoder_depth={depth}: a hybrid decoder's last {GLOBAL_BLOCKS_OF_HYBRID} blocks are global"
        )
    return {"global": 0, "local": depth, "hybrid": depth - GLOBAL_BLOCKS_OF_HYBRID}[decoder]


class AudioMAE(nn.Module):
    """Pre-train `encoder` by predicting hidden patches.

    `frontend` turns waveforms into spectrograms of a fixed length. `norm_target` predicts patches normalised one by
    one. Ratios per axis are for time+frequency masking; null splits `mask_ratio` evenly. Differs: with a `level_weight`
    above 0 the last layer also predicts each patch's mean and standard deviation, whose squared error counts so much;
    the paper's normalised patches leave both unknown, and a picture of them has no loudness.
    """

    def __init__(
        self,
        *,
        frontend: nn.Module,
        patch: int,
        stride: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        positions: Literal["published", "corrected"],
        drop_path: float,
        mask: Literal["random", "time", "frequency", "time+frequency"],
        mask_ratio: float,
        mask_ratio_time: float | None,
        mask_ratio_frequency: float | None,
        decoder: Literal["global", "local", "hybrid"],
        decoder_width: int,
        decoder_depth: int,
        decoder_num_heads: int,
        decoder_window: int,
        decoder_shift: Literal["time", "both", "none"],
        decoder_dropout: float,
        norm_target: bool,
        level_weight: float,
    ):
        super().__init__()
        if level_weight and not norm_target:
            raise UserError(f"model.level_weight={level_weight}: has no effect without model.norm_target=true")
        if frontend.frames is None:
            raise UserError("frontend.seconds=null: Audio-MAE needs a fixed length, frontend.seconds=10.24 for example")
        self.frontend = frontend
        self.norm_target, self.level_weight = norm_target, level_weight
        self.masking = Masking(mask, mask_ratio, mask_ratio_time, mask_ratio_frequency)
        shared = dict(mlp_ratio=mlp_ratio, positions=positions)
        cut = dict(num_mels=frontend.num_mels, frames=frontend.frames, patch=(patch, patch), stride=(stride, stride))
        self.encoder = Encoder(**cut, **shared, width=width, depth=depth, num_heads=num_heads, drop_path=drop_path)
        if stride == patch:  # every frame is to be predicted
            check_tiled("frontend.seconds", "frames", frontend.frames, patch)
        sizes = dict(encoder_width=width, width=decoder_width, depth=decoder_depth, num_heads=decoder_num_heads)
        local = dict(window=decoder_window, shift=decoder_shift, dropout=decoder_dropout)
        num_values = patch * patch + (2 if level_weight else 0)
        grid = dict(grid=self.encoder.grid, overlapping=stride != patch, num_values=num_values)
        self.decoder = Decoder(decoder=decoder, **sizes, **local, **grid, **shared)
        self.tokens_per_clip = self.encoder.grid[0] * self.encoder.grid[1]
        if self.masking.num_kept(self.encoder.grid) == self.tokens_per_clip:
            raise UserError(f"model.mask_ratio={mask_ratio} hides none of {self.tokens_per_clip} patches: raise it")

    def forward(self, batch: Batch, *, generator: Noise) -> dict[str, Tensor]:
        """Return the `loss`: the mean squared error of the hidden patches, and of their levels.

        In training the mean is over the hidden patches of all ranks, and `weight` counts them, so that micro-batches
        can be weighed against each other. Some clips, or all, may have been unreadable.
        """
        losses = self._losses(batch, generator)
        if not self.training:
            return {"loss": losses.sum() / max(len(losses), 1)}
        total = sum_of_all_ranks(len(losses), losses.device)
        return {"loss": mean_of_all_ranks(losses, total), "weight": total}

    def _losses(self, batch: Batch, generator: Noise) -> Tensor:
        """Say how wrong each hidden patch of the batch is: (B * K,)."""
        if len(batch) == 0:  # every clip of the micro-batch was unreadable; DDP still wants a gradient everywhere
            return 0.0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum().expand(0)
        spectrogram = batch.spectrogram
        if spectrogram is None:
            spectrogram = self.frontend(batch.waveform, batch.num_samples, generator)
        keep = self.masking.keep(generator, self.encoder.grid_for(spectrogram))
        return self.patch_losses(spectrogram, keep).flatten()

    def loss(self, spectrogram: Tensor, keep: Tensor) -> Tensor:
        """Compare prediction and target where patches are hidden; (B, 1, F, T) with keep (B, K) -> scalar.

        The published sum over hidden / number of hidden.
        """
        return self.patch_losses(spectrogram, keep).mean()

    def patch_losses(self, spectrogram: Tensor, keep: Tensor) -> Tensor:
        """Give the squared error of each hidden patch, and of its level: (B, N - K)."""
        decoded = self.decode(spectrogram, keep)
        gaps = hidden(keep, decoded.shape[1])
        prediction = self.decoder.values(take(decoded, gaps))
        patches = take(patchify(spectrogram, self.encoder.patch, self.encoder.stride), gaps)
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))  # whatever the precision around it
        values, levels = prediction.to(patches.dtype).tensor_split([patches.shape[-1]], dim=-1)
        losses = (values - (normalise_patches(patches) if self.norm_target else patches)).square().mean(-1)
        if self.level_weight:
            losses = losses + self.level_weight * (levels - patch_levels(patches)).square().mean(-1)
        return losses

    def decode(self, spectrogram: Tensor, keep: Tensor) -> Tensor:
        """Encode what is kept and decode all: (B, N, E)."""
        latent = self.encoder(spectrogram, keep)
        return self.decoder(latent, keep, self.encoder.grid_for(spectrogram))

    @torch.no_grad()
    def reconstruct(self, spectrogram: Tensor, *, keep: Tensor) -> dict[str, Tensor]:
        """Fill in what is hidden, for pictures and sound; what the hidden patches held changes nothing here.

        Returns `prediction` (B, 1, F, T) of every patch in the spectrogram's units; `filled`, the visible cells with
        the prediction in the gaps; `hidden` (B, 1, F, T) bool, cells that no visible patch covers; `mask` (B, N). For
        normalised targets without a `level_weight` a patch's level and spread are no part of the prediction. They are
        guessed from *visible* patches (`spread_from_visible`), never taken from the hidden one, as pictures of MAE
        commonly do.
        """
        grid = self.encoder.grid_for(spectrogram)
        patch, stride = self.encoder.patch, self.encoder.stride
        prediction = self.decoder.values(self.decode(spectrogram, keep)).float()
        values, levels = prediction.tensor_split([patch[0] * patch[1]], dim=-1)
        if self.norm_target:
            visible = take(patchify(spectrogram, patch, stride), keep)
            level = levels.split(1, dim=-1) if self.level_weight else spread_from_visible(visible, keep, grid)
            values = values * level[1].clamp(min=0) + level[0]
        mask = keep_to_mask(keep, grid[0] * grid[1])
        prediction = unpatchify(values, grid, patch, stride)
        shown = unpatchify((~mask).float()[:, :, None].expand_as(values), grid, patch, stride)
        gaps = shown == 0
        covered = spectrogram[..., : gaps.shape[2], : gaps.shape[3]]
        return {
            "prediction": prediction,
            "filled": torch.where(gaps, prediction, covered),
            "hidden": gaps,
            "mask": mask,
        }
