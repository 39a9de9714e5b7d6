"""Which patches does the encoder see?

Random numbers decide: the cells, columns or rows with the smallest ones stay. One decision has two faces, `keep` (B,
K) for encoders that drop hidden patches and `mask` (B, N) for those that replace them. Random, time, frequency and
time+frequency masking as in Audio-MAE (2207.06405); random is what it was pre-trained with.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from audiossl.errors import UserError
from audiossl.noise import Noise


def num_kept(count: int, ratio: float) -> int:
    """Count what stays of `count` at a masking `ratio`, cut off as published: 512 at .8 keeps 102, 64 at .7 19."""
    return int(count * (1 - ratio))


def smallest(noise: Tensor, count: int) -> Tensor:
    """Find where the `count` smallest of (B, N) random numbers lie: (B, count) int64, ascending positions."""
    order = noise.argsort(dim=1, stable=True)  # stable: ties fall the same way on every device
    return order[:, :count].sort(dim=1).values


def keep_random(noise: Tensor, ratio: float) -> Tensor:
    """Keep single patches: noise (B, N) -> keep (B, K)."""
    return smallest(noise, num_kept(noise.shape[1], ratio))


def keep_cells(rows: Tensor, columns: Tensor, num_columns: int) -> Tensor:
    """Keep the cells where kept rows (B, R) and kept columns (B, C) cross: (B, R * C) ascending."""
    return (rows[:, :, None] * num_columns + columns[:, None, :]).flatten(1)


def keep_columns(noise: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """Keep whole columns, hide the others (time masking): noise (B, columns) -> keep (B, K)."""
    columns = smallest(noise, num_kept(grid[1], ratio))
    return keep_cells(_every(grid[0], noise), columns, grid[1])


def keep_rows(noise: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """Keep whole rows, hide the others (frequency masking): noise (B, rows) -> keep (B, K)."""
    rows = smallest(noise, num_kept(grid[0], ratio))
    return keep_cells(rows, _every(grid[1], noise), grid[1])


def keep_columns_and_rows(
    noise_time: Tensor, noise_frequency: Tensor, grid: tuple[int, int], ratio_time: float, ratio_frequency: float
) -> Tensor:
    """Hide whole columns and whole rows: noise (B, columns) and (B, rows) -> keep (B, K), where kept ones cross."""
    columns = smallest(noise_time, num_kept(grid[1], ratio_time))
    rows = smallest(noise_frequency, num_kept(grid[0], ratio_frequency))
    return keep_cells(rows, columns, grid[1])


def _every(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device).expand(len(like), -1)


def keep_to_mask(keep: Tensor, num_patches: int) -> Tensor:
    """Turn keep (B, K) into mask (B, N), True = hidden."""
    mask = torch.ones(len(keep), num_patches, dtype=torch.bool, device=keep.device)
    return mask.scatter(1, keep, False)


def mask_to_keep(mask: Tensor) -> Tensor:
    """Turn mask (B, N) into keep (B, K) ascending; every clip must keep the same number."""
    counts = (~mask).sum(1).unique()
    assert len(counts) <= 1, "clips keep different numbers of patches"
    return (~mask).nonzero()[:, 1].reshape(len(mask), int(counts[0]) if len(counts) else 0)


def hidden(keep: Tensor, num_patches: int) -> Tensor:
    """List what `keep` (B, K) leaves out: (B, N - K) int64 ascending."""
    mask = keep_to_mask(keep, num_patches)  # sorted, since asking a GPU for a mask's places makes the host wait
    return mask.byte().argsort(dim=1, descending=True, stable=True)[:, : num_patches - keep.shape[1]]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens (B, N, D) at index (B, K): (B, K, D)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


class Masking:
    """Draw `keep` by name. Ratios lie in [0, 1); at least one patch must stay.

    `ratio` hides that share of patches. For time+frequency it is split evenly between the axes, 1 - sqrt(1 - ratio)
    each, unless `ratio_time` and `ratio_frequency` say otherwise.

    Raises `UserError` for an unknown name, a ratio outside [0, 1), or one that keeps nothing.
    """

    def __init__(
        self,
        mask: Literal["random", "time", "frequency", "time+frequency"],
        ratio: float,
        ratio_time: float | None,
        ratio_frequency: float | None,
    ):
        if mask not in ("random", "time", "frequency", "time+frequency"):
            raise UserError(f"model.mask={mask!r}: choose random, time, frequency or time+frequency")
        named = {"mask_ratio": ratio, "mask_ratio_time": ratio_time, "mask_ratio_frequency": ratio_frequency}
        for key, value in named.items():
            if value is not None and not 0 <= value < 1:
                raise UserError(f"model.{key}={value}: the share of hidden patches lies in [0, 1), 0.8 for example")
        if mask != "time+frequency" and (ratio_time is not None or ratio_frequency is not None):
            raise UserError(f"model.mask={mask} takes one model.mask_ratio; ratios per axis are for time+frequency")
        each = 1 - math.sqrt(1 - ratio)
        self.mask = mask
        self.ratio = ratio
        self.ratio_time = each if ratio_time is None else ratio_time
        self.ratio_frequency = each if ratio_frequency is None else ratio_frequency

    def num_kept(self, grid: tuple[int, int]) -> int:
        """Count the patches K that stay of a grid."""
        rows, columns = grid
        match self.mask:
            case "random":
                count = num_kept(rows * columns, self.ratio)
            case "time":
                count = rows * num_kept(columns, self.ratio)
            case "frequency":
                count = num_kept(rows, self.ratio) * columns
            case _:
                count = num_kept(rows, self.ratio_frequency) * num_kept(columns, self.ratio_time)
        if count == 0:
            raise UserError(
                f"model.mask_ratio={self.ratio} with model.mask={self.mask} keeps none of {rows} x {columns} patches: "
                "lower it"
            )
        return count

    def keep(self, generator: Noise, grid: tuple[int, int]) -> Tensor:
        """Draw keep (B, K) for a batch of grids."""
        self.num_kept(grid)
        rows, columns = grid
        match self.mask:
            case "random":
                return keep_random(generator.uniform(rows * columns), self.ratio)
            case "time":
                return keep_columns(generator.uniform(columns), grid, self.ratio)
            case "frequency":
                return keep_rows(generator.uniform(rows), grid, self.ratio)
        noise_time, noise_frequency = generator.uniform(columns), generator.uniform(rows)
        return keep_columns_and_rows(noise_time, noise_frequency, grid, self.ratio_time, self.ratio_frequency)


class Patchout:
    """Choose the patches that training keeps: `time` columns and `frequency` rows go, then `single` of what is left.

    per_clip: every clip loses others; published: all clips of a batch lose the same.
    """

    def __init__(self, *, time: int, frequency: int, single: int, per_clip: bool, section: str = "model"):
        for name, value in (("time", time), ("frequency", frequency), ("random", single)):
            if value < 0:
                raise UserError(f"{section}.patchout_{name}={value}: must be at least 0, which leaves nothing out")
        self.time, self.frequency, self.single, self.per_clip = time, frequency, single, per_clip
        self.section = section  # of the settings, for errors

    def num_kept(self, grid: tuple[int, int]) -> int:
        """Count the patches K that stay of a grid; raise `UserError` where none does."""
        rows, columns = grid[0] - self.frequency, grid[1] - self.time
        count = rows * columns - self.single
        if min(rows, columns, count) < 1:
            raise UserError(
                f"{self.section}.patchout_time={self.time}, patchout_frequency={self.frequency} and patchout_random="
                f"{self.single} leave nothing of {grid[0]} x {grid[1]} patches (frequency x time): lower them"
            )
        return count

    def keep(self, generator: Noise, grid: tuple[int, int]) -> Tensor | None:
        """Draw keep (B, K) int64, ascending; None where nothing is left out."""
        if self.time == self.frequency == self.single == 0:
            return None
        self.num_kept(grid)
        clips = len(generator.rows)

        def chosen(count: int, kept: int) -> Tensor:
            uniform = generator.uniform(count) if self.per_clip else generator.shared(1, count).expand(clips, -1)
            return smallest(uniform, kept)

        columns, rows = chosen(grid[1], grid[1] - self.time), chosen(grid[0], grid[0] - self.frequency)
        keep = keep_cells(rows, columns, grid[1])
        return keep.gather(1, chosen(keep.shape[1], keep.shape[1] - self.single)) if self.single else keep
