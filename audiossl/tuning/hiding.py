"""Which patches does fine-tuning leave out?

Audio-MAE (2207.06405) hides a share of the columns and of the rows of each clip, PaSST (2110.05069) a number of them,
and of single patches: shorter sequences, and a classifier that cannot rely on any one place. Nothing is left out in
evaluation.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from audiossl.errors import UserError
from audiossl.masking import Masking, Patchout
from audiossl.noise import Noise


class Hiding(nn.Module):
    """Choose the patches that training keeps; all zero keeps every one.

    mask_ratio_time, mask_ratio_frequency: shares of columns and rows of each clip, [0, 1); how many stay is cut off
    as published, 51 of 64 at .2. patchout_time, patchout_frequency, patchout_random: numbers of columns, of rows, and
    of single patches of what is left. draws: `published` leaves the same out of all clips of a batch (patchout only),
    `corrected` something else of each. Raises `UserError` where both ways are asked for.
    """

    def __init__(
        self,
        *,
        mask_ratio_time: float,
        mask_ratio_frequency: float,
        patchout_time: int,
        patchout_frequency: int,
        patchout_random: int,
        draws: Literal["published", "corrected"],
    ):
        super().__init__()
        if draws not in ("published", "corrected"):
            raise UserError(f"model.hiding.draws={draws!r}: choose published or corrected")
        counts = dict(time=patchout_time, frequency=patchout_frequency, single=patchout_random)
        self.patchout = Patchout(**counts, per_clip=draws == "corrected", section="model.hiding")
        is_masked, self.leaves_out = mask_ratio_time > 0 or mask_ratio_frequency > 0, any(counts.values())
        if is_masked and self.leaves_out:
            raise UserError(
                "model.hiding: mask_ratio_time and mask_ratio_frequency, or patchout_*, but not both; set one to 0"
            )
        self.masking = Masking("time+frequency", 0.0, mask_ratio_time, mask_ratio_frequency) if is_masked else None
        self.hides_columns = bool(mask_ratio_time or patchout_time or patchout_random)
        self.is_on = is_masked or self.leaves_out

    def check(self, grid: tuple[int, int]) -> None:
        """Raise `UserError` where nothing of a grid (rows, columns) would stay."""
        (self.patchout if self.masking is None else self.masking).num_kept(grid)

    def keep(self, generator: Noise, grid: tuple[int, int]) -> Tensor | None:
        """Draw keep (B, K) int64, ascending, for a batch of grids (rows, columns); None where nothing is left out."""
        return self.patchout.keep(generator, grid) if self.masking is None else self.masking.keep(generator, grid)
