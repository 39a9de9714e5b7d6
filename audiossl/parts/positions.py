"""How does a token know where it lies?

By a vector added to it. Audio-MAE (2207.06405, after MAE 2111.06377) has fixed 2-D sine-cosine codes, one half of the
channels per axis; ATST (2204.12076) a learned vector per column; PaSST (2110.05069) a learned one per row and one per
column.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from audiossl.errors import UserError
from audiossl.masking import take


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


class Positions(nn.Module):
    """Add to every token what its cell of a table (rows, columns, D) holds; `class_table` is for class tokens."""

    cells: Tensor
    is_learned = True

    def forward(
        self, tokens: Tensor, first_column: int = 0, *, keep: Tensor | None = None, num_cells: int | None = None
    ) -> Tensor:
        """Return tokens (B, N, D) plus their positions; N must be whole columns of the table.

        With keep (B, K) they are those of `num_cells`, which must be whole columns: (B, K, D).
        """
        codes = cut_table(self.cells, num_cells or tokens.shape[1], first_column)
        codes = codes if self.is_learned else codes.to(tokens.dtype)
        return tokens + (codes if keep is None else take(codes.expand(len(keep), -1, -1), keep))


class SinCosPositions(Positions):
    """Add the fixed code of its cell to every token; clips shorter than the table take its first columns.

    The table is a persistent buffer: an exported model carries the codes it was trained with. Class tokens have none.
    """

    table: Tensor
    class_table, is_learned = None, False

    def __init__(
        self, *, grid: tuple[int, int], width: int, positions: Literal["published", "corrected"], overlapping: bool
    ):
        super().__init__()
        if positions not in ("published", "corrected"):
            raise UserError(f"model.positions={positions!r}: choose published or corrected")
        self.register_buffer("table", sincos_table(grid, width, positions=positions, overlapping=overlapping))

    @property
    def cells(self) -> Tensor:
        return self.table


class LearnedPositions(Positions):
    """Add a learned vector per cell, and `class_table` (1, n, D) to n class tokens (ATST, 2204.12076).

    Positions are cut, never stretched: a shorter clip takes the columns from `first_column` on.
    """

    def __init__(self, *, grid: tuple[int, int], width: int, num_class_tokens: int):
        super().__init__()
        self.table = nn.Parameter(truncated_normal(*grid, width))
        self.class_table = nn.Parameter(truncated_normal(1, num_class_tokens, width)) if num_class_tokens else None

    @property
    def cells(self) -> Tensor:
        return self.table


class AxisPositions(Positions):
    """Add a learned vector per row and another per column, as PaSST does (2110.05069)."""

    def __init__(self, *, grid: tuple[int, int], width: int, num_class_tokens: int):
        super().__init__()
        rows, columns = grid
        self.frequency = nn.Parameter(truncated_normal(rows, 1, width))
        self.time = nn.Parameter(truncated_normal(1, columns, width))
        self.class_table = nn.Parameter(truncated_normal(1, num_class_tokens, width)) if num_class_tokens else None

    @property
    def cells(self) -> Tensor:
        return self.time + self.frequency


def truncated_normal(*shape: int) -> Tensor:
    """Draw a start for learned vectors: normal of deviation .02, cut at 2 (absolute), as timm's ViT and ATST's."""
    return nn.init.trunc_normal_(torch.empty(shape), std=0.02)


def cut_table(table: Tensor, num_tokens: int, first_column: int) -> Tensor:
    """Take the columns of a table (rows, columns, D) that `num_tokens` need, from `first_column` on: (1, N, D)."""
    rows, columns, width = table.shape
    used, rest = divmod(num_tokens, rows)
    fits = rest == 0 and first_column >= 0 and first_column + used <= columns
    assert fits, f"{num_tokens} tokens from column {first_column} do not fit a table of {rows} x {columns}"
    return table[:, first_column : first_column + used].reshape(1, -1, width)


def interpolate_positions(table: Tensor, columns: int) -> Tensor:
    """Stretch a table (rows, N, D) over `columns` columns, bicubically: (rows, columns, D).

    The scale is (columns + .1) / N, and (rows + .1) / rows: DINO's guard against rounding, which ATST's code took over
    under `pos_type=interpolate`. So a table is stretched by a tenth of a column at its own length too, as ATST-Frame's
    is; ATST-Clip's code leaves it alone there. No published weights were trained so: they cut.
    """
    rows, length, _ = table.shape
    scale = ((rows + 0.1) / rows, (columns + 0.1) / length)
    stretched = functional.interpolate(table.permute(2, 0, 1)[None], scale_factor=scale, mode="bicubic")[0]
    assert stretched.shape[1:] == (rows, columns), f"{tuple(stretched.shape[1:])} instead of {(rows, columns)}"
    return stretched.permute(1, 2, 0)


def build_positions(
    positions: Literal["published", "corrected", "learned", "time+frequency"],
    *,
    grid: tuple[int, int],
    width: int,
    overlapping: bool,
    num_class_tokens: int,
) -> SinCosPositions | LearnedPositions | AxisPositions:
    """Build positions by name: `published` and `corrected` are fixed sine-cosine codes, the others learned."""
    if positions in ("published", "corrected"):
        return SinCosPositions(grid=grid, width=width, positions=positions, overlapping=overlapping)
    learned = {"learned": LearnedPositions, "time+frequency": AxisPositions}
    if positions not in learned:
        raise UserError(f"model.positions={positions!r}: choose published, corrected, learned or time+frequency")
    return learned[positions](grid=grid, width=width, num_class_tokens=num_class_tokens)
